"""A limit for each of many waits: setting a timer for every message would cost as much as writing the message."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable


class WaitLimit:
    """For waits of one task, one after the other, each for at most `limit_s`. One timer looks after them all; `stop`
    when none follows."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[object] | None = None  # while it waits
        self._since = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._has_passed = False

    async def wait(self, what: Awaitable[object]) -> None:
        """TimeoutError if it takes too long; it is cancelled then."""
        task = asyncio.current_task()
        assert task is not None
        self._task, self._since = task, self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_at(self._since + self._limit_s, self._look)
        try:
            await what
        finally:
            has_passed, self._has_passed, self._task = self._has_passed, False, None
            if has_passed and not task.uncancel():  # else it is cancelled from elsewhere, too
                raise TimeoutError from None

    def stop(self) -> None:
        """No wait follows."""
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        self._timer = None
        if self._task is None:
            return  # the next wait sets it again
        due = self._since + self._limit_s
        if self._loop.time() < due:
            self._timer = self._loop.call_at(due, self._look)
        else:
            self._has_passed = True
            self._task.cancel()
