"""What came of the requests that one program served, to compare programs."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

from services.router.metrics import ARM_REQUESTS, ARM_SECONDS
from services.router.traces import Trace

MAX_SAMPLES = 4096


@dataclass(frozen=True, slots=True)
class Distribution:
    """Times in seconds of the latest requests that ended well; all zero where there are none."""

    count: int = 0
    mean_s: float = 0.0
    p50_s: float = 0.0
    p99_s: float = 0.0

    @classmethod
    def of(cls, samples: Iterable[float]) -> Distribution:
        """Of any number of samples; percentiles are samples themselves (nearest rank)."""
        values = sorted(samples)
        if not values:
            return cls()

        def rank(share: float) -> float:
            return values[min(len(values) - 1, int(share * len(values)))]

        return cls(len(values), fmean(values), rank(0.5), rank(0.99))


class Results:
    """Counts of all requests of an arm, and the times of the latest MAX_SAMPLES that ended well."""

    def __init__(self, policy: str) -> None:
        self.policy = policy
        self.codes: Counter[str] = Counter()
        self._ttft_s: deque[float] = deque(maxlen=MAX_SAMPLES)
        self._tpot_s: deque[float] = deque(maxlen=MAX_SAMPLES)
        self._jct_s: deque[float] = deque(maxlen=MAX_SAMPLES)

    def add(self, trace: Trace) -> None:
        """A request has ended."""
        self.codes[trace.code] += 1
        ARM_REQUESTS.labels(self.policy, trace.code).inc()
        if trace.code != "OK":
            return
        for name, samples, value in (
            ("ttft", self._ttft_s, trace.first_token_s),
            ("tpot", self._tpot_s, trace.per_token_s),
            ("jct", self._jct_s, trace.duration_s),
        ):
            if value is not None:
                samples.append(value)
                ARM_SECONDS.labels(self.policy, name).observe(value)

    @property
    def ttft(self) -> Distribution:
        """Time to first token."""
        return Distribution.of(self._ttft_s)

    @property
    def tpot(self) -> Distribution:
        """Time per output token after the first."""
        return Distribution.of(self._tpot_s)

    @property
    def jct(self) -> Distribution:
        """Job completion time: from arrival to the last token."""
        return Distribution.of(self._jct_s)
