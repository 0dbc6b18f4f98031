"""Who is told what enters and leaves the prefix cache."""

from __future__ import annotations

from collections.abc import Callable

from services.engine.core.api import CacheEvent
from services.engine.core.pool import PagePool


class CacheWatch:
    """Numbers the changes of the prefix cache one after the other, whether or not anybody watches."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._sequence = 0
        self._watchers: dict[int, Callable[[CacheEvent], None]] = {}

    def watch(self, watcher_id: int, on_event: Callable[[CacheEvent], None]) -> None:
        """Delivers a snapshot now, and every change from then on."""
        self.flush()
        self._watchers[watcher_id] = on_event
        on_event(CacheEvent(self._sequence, True, self._pool.snapshot(), ()))

    def unwatch(self, watcher_id: int) -> None:
        """Delivers no more. Unknown ids are ignored."""
        self._watchers.pop(watcher_id, None)

    def flush(self) -> None:
        """Delivers what changed since the last time, if anything did."""
        change = self._pool.take_change()
        if change:
            self._sequence += 1
            event = CacheEvent(self._sequence, False, change.stored, change.removed)
            for on_event in self._watchers.values():
                on_event(event)
