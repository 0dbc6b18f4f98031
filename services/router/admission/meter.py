"""How fast something goes while there is something to do."""

from __future__ import annotations

from collections.abc import Callable

# Time after which what was seen counts half.
_HALF_LIFE_S = 5.0
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
        self._settle()
        self._busy_since = self._clock() if busy else None

    def add(self, amount: float) -> None:
        """So much has been done."""
        self._settle()
        self._amount += amount

    def rate(self) -> float | None:
        """None while too little has been seen."""
        self._settle()
        if self._busy_s < _SHORTEST_S or not self._amount:
            return None
        return self._amount / self._busy_s

    def _settle(self) -> None:
        if self._busy_since is None:
            return
        now = self._clock()
        passed_s = now - self._busy_since
        fading = 0.5 ** (passed_s / _HALF_LIFE_S)
        self._amount *= fading
        self._busy_s = self._busy_s * fading + passed_s
        self._busy_since = now
