"""Prompts that the engines have not computed yet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable

from services.router.admission.meter import Meter

# A prompt that takes longer is not waiting for its turn on an engine: its program or its engine hangs.
_FORGET_S = 30.0
# An engine computes fewer in hardly less time, alone or with others: they do not bound how fast it could go.
_FULL_STEP_TOKENS = 2048


class Prompts:
    """How many tokens they have, and how fast such tokens are computed."""

    def __init__(self, clock: Callable[[], float], forgot: Callable[[], None], num_engines: Callable[[], int]) -> None:
        """`forgot` is called when prompts are counted no more because they took too long; each of `num_engines` could
        compute one at the same time."""
        self._clock = clock
        self._forgot = forgot
        self._num_engines = num_engines
        self._meter = Meter(clock)
        self._counted: dict[Hashable, tuple[int, float]] = {}  # tokens, and when it is forgotten: in that order
        self._alone: Hashable | None = None  # the only one since there was none
        self._has_timer = False  # one for all: to start one costs more than all the rest
        self.num_tokens = 0

    def begin(self, name: Hashable, num_tokens: int) -> None:
        """An engine has one more to compute."""
        self._alone = None if self._counted else name
        if not self._counted:
            self._meter.set_busy(True)
        forget_at = self._clock() + _FORGET_S
        self._counted[name] = num_tokens, forget_at
        self.num_tokens += num_tokens
        if not self._has_timer:
            self._set_timer(forget_at)

    def computed(self, name: Hashable) -> bool:
        """It has been computed. False if it was not counted any more."""
        if name not in self._counted:
            return False
        num_tokens, _ = self._counted[name]
        self._meter.add(num_tokens, self._lead_share(num_tokens) if self._alone == name else 0.0)
        self.drop(name)
        return True

    def drop(self, name: Hashable) -> int:
        """It is not counted any more. Tokens that it had; 0 if it was not counted before."""
        if name not in self._counted:
            return 0
        num_tokens, _ = self._counted.pop(name)
        self.num_tokens -= num_tokens
        if not self._counted:
            self._meter.set_busy(False)
        return num_tokens

    def rate(self) -> float | None:
        """Tokens computed a second; None while too little has been seen."""
        return self._meter.rate()

    def fastest_rate(self) -> float | None:
        """What that is seldom above; None while too little has been seen."""
        return self._meter.fastest()

    def _lead_share(self, num_tokens: int) -> float:
        """What the time of one that was alone counts: all engines together could have gone so much faster."""
        return 1 / max(1, self._num_engines()) if num_tokens >= _FULL_STEP_TOKENS else 0.0

    def _set_timer(self, forget_at: float) -> None:
        self._has_timer = True
        asyncio.get_running_loop().call_later(forget_at - self._clock(), self._forget, forget_at)

    def _forget(self, now: float) -> None:
        """Those whose time is over `now`, for which the timer was set: it may come a little early by the clock."""
        self._has_timer = False
        over = [name for name, (_, forget_at) in self._counted.items() if forget_at <= now]
        for name in over:
            self.drop(name)
        if self._counted:
            _, oldest = next(iter(self._counted.values()))
            self._set_timer(oldest)
        if over:
            self._forgot()
