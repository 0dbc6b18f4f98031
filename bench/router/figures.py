"""What the measurements give."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Figure:
    """One number, and what is aimed at: the least where `at_least`, else the most; None: nothing."""

    key: str
    what: str
    value: float
    aim: float | None = None
    at_least: bool = False

    @property
    def reached(self) -> bool:
        """Whether the aim is; true where there is none."""
        compare = operator.ge if self.at_least else operator.le
        return self.aim is None or compare(self.value, self.aim)


@dataclass(slots=True)
class Report:
    """All figures of a run, and why others are missing."""

    figures: list[Figure] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, figures: Sequence[Figure]) -> None:
        """More of them."""
        self.figures.extend(figures)

    def flat(self) -> dict[str, float]:
        """By key, as build/bench/router.json has them."""
        return {figure.key: figure.value for figure in self.figures}


def percentile(values: Sequence[float], share: float) -> float:
    """The value that this share of them does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
