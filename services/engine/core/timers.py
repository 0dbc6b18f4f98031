"""Things to do at a time: leases, deadlines, bounded waits."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count

_CLEAN_AT = 1024


class Timer:
    """One thing to do once. Cancelled ones are skipped when their time comes."""

    __slots__ = ("action",)

    def __init__(self, action: Callable[[], None]) -> None:
        self.action: Callable[[], None] | None = action

    def cancel(self) -> None:
        """Forgets the action and what it refers to. May be called at any time, also after it ran."""
        self.action = None


class Timers:
    """A heap of timers; times are seconds on the engine's clock."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Timer]] = []
        self._numbers = count()
        self._clean_at = _CLEAN_AT

    def at(self, when: float, action: Callable[[], None]) -> Timer:
        """Runs `action` in the first run_due() at or after `when`; equal times in order of asking."""
        timer = Timer(action)
        if len(self._heap) >= self._clean_at:
            # Cancelled timers whose time is far away would otherwise stay until it comes.
            self._heap = [entry for entry in self._heap if entry[2].action is not None]
            heapq.heapify(self._heap)
            self._clean_at = max(_CLEAN_AT, 2 * len(self._heap))
        heapq.heappush(self._heap, (when, next(self._numbers), timer))
        return timer

    def run_due(self, now: float) -> None:
        """Runs what is due, also what the actions themselves put at or before `now`."""
        while self._heap and self._heap[0][0] <= now:
            timer = heapq.heappop(self._heap)[2]
            if (action := timer.action) is not None:
                timer.action = None
                action()

    def next_due(self) -> float | None:
        """When the next timer is due, or None."""
        while self._heap and self._heap[0][2].action is None:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None
