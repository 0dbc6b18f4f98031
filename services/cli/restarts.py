"""How often services may be started again: what dies again and again has a cause that a restart does not mend."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable

MOST_RESTARTS = 3
PERIOD_S = 60.0
# A start that takes longer than both hangs, and is tried again.
_SHORTEST_START_S = 60.0
_TIMES_FIRST_START = 10.0


def start_limit_s(first_start_s: float, longest_s: float) -> float:
    """How long a service may take to be ready again that took `first_start_s` at first; at most `longest_s`."""
    return min(longest_s, max(_SHORTEST_START_S, _TIMES_FIRST_START * first_start_s))


class Restarts:
    """Counts them for each service."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._times: defaultdict[str, deque[float]] = defaultdict(deque)
        self._failed_starts: defaultdict[str, int] = defaultdict(int)  # in a row, up to now

    def allow(self, name: str, was_ready: bool) -> bool:
        """Whether the service may be started again, that died after it `was_ready` or before; then this counts as one.
        MOST_RESTARTS within PERIOD_S may, unless as many starts in a row came to nothing, however long each took."""
        now, times = self._clock(), self._times[name]
        while times and now - times[0] >= PERIOD_S:
            times.popleft()
        self._failed_starts[name] = 0 if was_ready else self._failed_starts[name] + 1
        if MOST_RESTARTS in (len(times), self._failed_starts[name]):
            return False
        times.append(now)
        return True
