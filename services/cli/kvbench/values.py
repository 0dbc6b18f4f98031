"""What the measurements give."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two arms of one run, taken in turn. Seconds a round, equally many rounds of each.

    `limit` is the ratio that is aimed at: at least it if `higher_is_better`, otherwise at most it.
    """

    name: str
    measured: str
    against: str
    measured_s: Sequence[float]
    against_s: Sequence[float]
    limit: float
    higher_is_better: bool = False
    # Bytes that each round of either arm moves; 0 where none are counted.
    num_bytes: int = 0

    @property
    def ratio(self) -> float:
        """Median over rounds of measured / against in time; the other way round, speeds, if higher is better."""
        pairs = zip(self.measured_s, self.against_s, strict=True)
        return statistics.median(b / a if self.higher_is_better else a / b for a, b in pairs)

    @property
    def reached(self) -> bool:
        """Whether the ratio is what it should be."""
        return self.ratio >= self.limit if self.higher_is_better else self.ratio <= self.limit


@dataclass(frozen=True, slots=True)
class Timeline:
    """One layer-wise send. Times in seconds from the call; `landed` are (time, share of the bytes in place).

    `compute_end_s` is the end of the step, a little after the last layer's KV was ready.
    """

    compute_begin_s: float
    compute_end_s: float
    exposed_s: float
    landed: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Overlap:
    """Layer-wise sends of prompts that are computed meanwhile. Seconds a round.

    `exposed_s`: last layer ready to last byte in place, by the transfer service's clock. `total_s`: what the same bytes
    take over the same link when all of them are computed before, which is the sum of the layers' put times.
    """

    layers: int
    exposed_s: Sequence[float]
    total_s: Sequence[float]
    prefill_s: Sequence[float]
    link: str
    timeline: Timeline

    @property
    def exposed_over_total(self) -> float:
        """Median of the rounds."""
        return statistics.median(a / b for a, b in zip(self.exposed_s, self.total_s, strict=True))

    @property
    def total_over_prefill(self) -> float:
        """How long the link is busy, as a share of the computing: 0.3 to 0.9 was aimed at."""
        return statistics.median(a / b for a, b in zip(self.total_s, self.prefill_s, strict=True))

    @property
    def limit(self) -> float:
        """One and a half layers."""
        return 1.5 / self.layers


@dataclass(slots=True)
class Report:
    """Everything that was measured. `left_out` says what was not and why."""

    comparisons: dict[str, Comparison] = field(default_factory=dict)
    overlap: Overlap | None = None
    left_out: dict[str, str] = field(default_factory=dict)

    def flat(self) -> dict[str, float]:
        """Ratios by key; a key that could not be measured is not there."""
        figures = {key: round(comparison.ratio, 4) for key, comparison in self.comparisons.items()}
        if self.overlap is not None:
            figures["exposed_over_total"] = round(self.overlap.exposed_over_total, 4)
            figures["layers"] = self.overlap.layers
            figures["total_over_prefill"] = round(self.overlap.total_over_prefill, 4)
        return figures
