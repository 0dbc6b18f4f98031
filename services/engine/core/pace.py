"""How fast the engine computes, to say when a retry is worth while."""

from __future__ import annotations

_WEIGHT = 0.1  # of the newest step
_SHORTEST_S, _LONGEST_S = 0.05, 10.0


class Pace:
    """A moving average of tokens a second over steps."""

    def __init__(self) -> None:
        self._tokens_per_s: float | None = None

    def step(self, num_tokens: int, seconds: float) -> None:
        """Takes in a step."""
        if seconds > 0:
            rate = num_tokens / seconds
            before = self._tokens_per_s
            self._tokens_per_s = rate if before is None else before + _WEIGHT * (rate - before)

    def seconds_for(self, num_tokens: int) -> float:
        """About how long so many tokens take, between 50 ms and 10 s; a second while nothing is known."""
        if not self._tokens_per_s:
            return 1.0
        return min(max(num_tokens / self._tokens_per_s, _SHORTEST_S), _LONGEST_S)
