"""A time that is seldom exceeded, from those that were seen."""

from __future__ import annotations

_GAIN, _DEVIATION_GAIN = 1 / 8, 1 / 4
_NUM_DEVIATIONS = 2.0


class Estimate:
    """Moving mean and moving mean deviation (Jacobson, Congestion Avoidance and Control, SIGCOMM 1988)."""

    def __init__(self) -> None:
        self._mean: float | None = None
        self._deviation = 0.0

    def add(self, seen: float) -> None:
        """One more was seen."""
        if self._mean is None:
            self._mean, self._deviation = seen, seen / 2
            return
        error = seen - self._mean
        self._mean += _GAIN * error
        self._deviation += _DEVIATION_GAIN * (abs(error) - self._deviation)

    def high(self) -> float:
        """What the next will seldom exceed; 0 if nothing was seen."""
        return 0.0 if self._mean is None else self._mean + _NUM_DEVIATIONS * self._deviation
