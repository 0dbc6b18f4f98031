"""The newest load of the engine, and everybody who watches it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from services.engine.core.api import Load
from services.engine.front.outbox import Outbox
from services.protocol.errors import ServiceError

DEFAULT_INTERVAL_S = 0.1
MIN_INTERVAL_S = 0.01


class LoadBoard:
    """Belongs to the event loop of `outbox`, but for publish()."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self.latest: Load | None = None
        self._is_awaited = False
        self._changed = asyncio.Event()
        self._ended = asyncio.Event()
        self._end: ServiceError | None = None

    def publish(self, load: Load) -> None:
        """Replaces the load. Watchers see the newest one at their own pace. One thread, whichever.

        The event loop is woken only if a watcher waits for it: most steps come while they all sleep.
        """
        self.latest = load
        # Read after the load was set, and set by a watcher before it looks: one of the two sees the other.
        if self._is_awaited:
            self._is_awaited = False
            self._outbox.post(self._tell)

    def end(self, error: ServiceError) -> None:
        """Ends every watch, present and future, with `error`."""
        self._end = error
        self._ended.set()
        self._tell()

    async def watch(self, interval_s: float) -> AsyncGenerator[Load, None]:
        """The load now, then whenever it has changed, at most once every `interval_s`."""
        seen: Load | None = None
        while True:
            seen = await self._other_than(seen)
            yield seen
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval_s):
                    await self._ended.wait()

    async def _other_than(self, seen: Load | None) -> Load:
        """The newest load, once it is another one. Raises what the watches end with."""
        while self._end is None:
            self._is_awaited = True
            load = self.latest
            if load is not None and load != seen:
                return load
            await self._changed.wait()
        raise self._end

    def _tell(self) -> None:
        # Each waiter holds the event of its own wait, so that none can miss a change.
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
