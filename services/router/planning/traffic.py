"""What was asked of late: a sample of the requests that is cheap to take and bounded to keep."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass

from services.router.clock import now
from services.router.request import PolicyRequest

WINDOW_S = 60.0
MAX_SAMPLES = 1024
MAX_TOKENS = 1 << 20  # of all samples: some 40 MB


@dataclass(frozen=True, slots=True)
class Sample:
    """One request of the sample."""

    at_s: float
    request: PolicyRequest
    weight: float  # requests that it stands for


class Traffic:
    """The requests of the last WINDOW_S seconds, each with the same chance to be kept; off until `begin`.

    When there is no room for more, every second one goes, by chance, those that stay stand for twice as many, and of
    those to come half as many are taken.
    """

    def __init__(self) -> None:
        self._samples: deque[Sample] = deque()
        self._num_tokens = 0
        self._on = False
        self._began_s = 0.0
        self._stands_for = 1.0  # a sample that is taken now
        self._chance = random.Random(0).random

    def begin(self) -> None:
        """From now on."""
        self._on, self._began_s = True, now()

    def end(self) -> None:
        """Nothing is kept any more."""
        self._on = False
        self._samples.clear()
        self._num_tokens, self._stands_for = 0, 1.0

    def saw(self, request: PolicyRequest) -> None:
        """A request begins. About a microsecond."""
        if self._on and (self._stands_for == 1.0 or self._chance() * self._stands_for < 1.0):
            self._samples.append(Sample(now(), request, self._stands_for))
            self._num_tokens += len(request.prompt)
            while self._samples and (len(self._samples) > MAX_SAMPLES or self._num_tokens > MAX_TOKENS):
                self._thin()

    def samples(self) -> tuple[Sample, ...]:
        """Those of the window, the oldest first."""
        horizon = now() - WINDOW_S
        while self._samples and self._samples[0].at_s < horizon:
            self._num_tokens -= len(self._samples.popleft().request.prompt)
        if len(self._samples) < MAX_SAMPLES // 4 and self._num_tokens < MAX_TOKENS // 4:
            self._stands_for = max(1.0, self._stands_for / 2)
        return tuple(self._samples)

    def span_s(self) -> float:
        """Seconds that the samples are of."""
        return max(1.0, min(WINDOW_S, now() - self._began_s))

    def _thin(self) -> None:
        self._stands_for *= 2
        kept = [each for each in self._samples if self._chance() < 0.5]
        self._samples = deque(Sample(each.at_s, each.request, 2 * each.weight) for each in kept)
        self._num_tokens = sum(len(each.request.prompt) for each in kept)
