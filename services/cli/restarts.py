"""How often services may be started again: what dies again and again has a cause that a restart does not mend."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable

MOST_RESTARTS = 3
PERIOD_S = 60.0


class Restarts:
    """Counts them for each service."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._times: defaultdict[str, deque[float]] = defaultdict(deque)

    def allow(self, name: str) -> bool:
        """Whether the service may be started again; then this counts as one. MOST_RESTARTS within PERIOD_S may."""
        now, times = self._clock(), self._times[name]
        while times and now - times[0] >= PERIOD_S:
            times.popleft()
        if len(times) == MOST_RESTARTS:
            return False
        times.append(now)
        return True
