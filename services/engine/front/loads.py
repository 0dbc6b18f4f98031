"""The newest load of the engine, and everybody who watches it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from services.engine.core.api import Load
from services.protocol.errors import ServiceError

DEFAULT_INTERVAL_S = 0.1
MIN_INTERVAL_S = 0.01


class LoadBoard:
    """Belongs to one event loop."""

    def __init__(self) -> None:
        self.latest: Load | None = None
        self._changed = asyncio.Event()
        self._ended = asyncio.Event()
        self._end: ServiceError | None = None

    def publish(self, load: Load) -> None:
        """Replaces the load. Watchers see the newest one at their own pace."""
        self.latest = load
        # Each waiter holds the event of its own wait, so that none can miss a change.
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def end(self, error: ServiceError) -> None:
        """Ends every watch, present and future, with `error`."""
        self._end = error
        self._ended.set()
        self._changed.set()

    async def watch(self, interval_s: float) -> AsyncGenerator[Load, None]:
        """The load now, then whenever it has changed, at most once every `interval_s`."""
        seen: Load | None = None
        while True:
            while self._end is None and (self.latest is None or self.latest == seen):
                await self._changed.wait()
            if self._end is not None:
                raise self._end
            seen = self.latest
            assert seen is not None
            yield seen
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval_s):
                    await self._ended.wait()
