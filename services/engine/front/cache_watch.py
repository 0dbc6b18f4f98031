"""Prefix cache events on their way to one reader, which must keep up or start again."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncGenerator, Callable

from services.engine.core.api import CacheEvent, Command, UnwatchCache, WatchCache
from services.engine.front.errors import CacheWatchBehind
from services.engine.front.outbox import Outbox
from services.protocol.errors import ServiceError

# Changes that a reader may leave unread. One step makes at most one event, so this is seconds of work.
MAX_UNREAD_EVENTS = 1024


class CacheWatches:
    """All readers of one engine. Belongs to the event loop of `outbox`, through which events come."""

    def __init__(self, submit: Callable[[Command], None], outbox: Outbox, max_unread: int = MAX_UNREAD_EVENTS) -> None:
        self._submit = submit
        self._outbox = outbox
        self._max_unread = max_unread
        self._ids = itertools.count(1)
        self._watches: set[_Watch] = set()
        self._end: ServiceError | None = None

    async def watch(self) -> AsyncGenerator[CacheEvent, None]:
        """A snapshot, then every change. Raises CacheWatchBehind when the reader is too slow."""
        if self._end is not None:
            raise self._end
        watch, watcher_id = _Watch(self._max_unread), next(self._ids)
        self._watches.add(watch)
        self._submit(WatchCache(watcher_id, lambda event: self._outbox.post(lambda: watch.put(event))))
        try:
            while True:
                yield await watch.take()
        finally:
            self._watches.discard(watch)
            self._submit(UnwatchCache(watcher_id))

    def end(self, error: ServiceError) -> None:
        """Ends every watch, present and future, with `error`."""
        self._end = error
        for watch in self._watches:
            watch.fail(error)


class _Watch:
    """A bounded queue that fails when it runs over."""

    def __init__(self, max_unread: int) -> None:
        self._events: deque[CacheEvent] = deque()
        self._max_unread = max_unread
        self._ready = asyncio.Event()
        self._failure: ServiceError | None = None

    def put(self, event: CacheEvent) -> None:
        if self._failure is not None:
            return
        if len(self._events) >= self._max_unread:
            self.fail(CacheWatchBehind("Too many events are unread: call again and start from the snapshot."))
            return
        self._events.append(event)
        self._ready.set()

    def fail(self, error: ServiceError) -> None:
        self._failure = error
        self._events.clear()
        self._ready.set()

    async def take(self) -> CacheEvent:
        while not self._events:
            if self._failure is not None:
                raise self._failure
            self._ready.clear()
            await self._ready.wait()
        return self._events.popleft()
