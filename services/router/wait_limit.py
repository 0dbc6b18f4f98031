"""A limit for each of many waits: setting a timer for every message would cost as much as writing the message."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable


class WaitedTooLong(TimeoutError):
    """A wait reached its limit."""


class WaitLimit:
    """For waits of one task, one after the other, each for at most `limit_s`. One timer looks after them all; `stop`
    when none follows."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[object] | None = None  # whose waits they are
        self._due: float | None = None  # while it waits
        self._timer: asyncio.TimerHandle | None = None
        self._has_passed = False

    async def wait(self, what: Awaitable[object]) -> None:
        """WaitedTooLong if it takes too long; it is cancelled then."""
        self._due = self._loop.time() + self._limit_s
        if self._timer is None:
            self._timer = self._loop.call_at(self._due, self._look)
            self._task = asyncio.current_task()
        try:
            await what
        finally:
            self._due = None
            if self._has_passed:
                self._end_late()

    def stop(self) -> None:
        """No wait follows."""
        if self._timer is not None:
            self._timer.cancel()

    def _end_late(self) -> None:
        self._has_passed = False
        assert self._task is not None
        if not self._task.uncancel():  # else it is cancelled from elsewhere, too
            raise WaitedTooLong from None

    def _look(self) -> None:
        self._timer = None
        if self._due is None:
            return  # the next wait sets it again
        if self._loop.time() < self._due:
            self._timer = self._loop.call_at(self._due, self._look)
        else:
            assert self._task is not None
            self._has_passed = True
            self._task.cancel()
