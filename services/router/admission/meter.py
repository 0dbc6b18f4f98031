"""How fast something goes while there is something to do."""

from __future__ import annotations

import math
from collections.abc import Callable

# Time after which what was seen counts half.
_HALF_LIFE_S = 5.0
_MEAN_LIFE_S = _HALF_LIFE_S / math.log(2)
# Less busy time than this says nothing.
_SHORTEST_S = 0.05


class Meter:
    """Units a second of busy time, recent ones counting most."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._amount = 0.0
        self._busy_s = 0.0
        self._busy_since: float | None = None

    def set_busy(self, busy: bool) -> None:
        """Whether there is something to do from now on."""
        if busy != (self._busy_since is not None):
            self._settle()
            self._busy_since = self._clock() if busy else None

    def add(self, amount: float) -> None:
        """So much has been done."""
        if self._busy_since is not None:
            self._settle()
        self._amount += amount

    def rate(self) -> float | None:
        """None while too little has been seen."""
        self._settle()
        if self._busy_s < _SHORTEST_S or not self._amount:
            return None
        return self._amount / self._busy_s

    def _settle(self) -> None:
        """Time fades as it passes, so that what comes out does not depend on how often this is called."""
        if self._busy_since is None:
            return
        now = self._clock()
        fading = 0.5 ** ((now - self._busy_since) / _HALF_LIFE_S)
        self._amount *= fading
        self._busy_s = self._busy_s * fading + (1 - fading) * _MEAN_LIFE_S
        self._busy_since = now
