"""Requests shared out between programs by percentage: canaries, and comparisons under one traffic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from services.router.errors import BadPolicy
from services.router.programs.program import BoundProgram
from services.router.programs.results import Results
from services.router.traces import Trace

MAX_ARMS = 8
# Multiples of the golden ratio spread evenly over [0, 1), and fall into step with no pattern of the traffic.
_STRIDE = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, slots=True)
class Arm:
    """A program, its share of the requests, and what came of them."""

    program: BoundProgram
    percent: float
    results: Results


class Split:
    """The arms: those asked for, and the current program with what they leave."""

    def __init__(self, base: BoundProgram, shares: Sequence[tuple[BoundProgram, float]]) -> None:
        """BadPolicy unless the shares are positive, together at most 100, and of different programs."""
        percents = [percent for _, percent in shares]
        if not all(0 < percent <= 100 for percent in percents) or sum(percents) > 100:
            raise BadPolicy("percentages are greater than 0 and together at most 100")
        if len(shares) > MAX_ARMS:
            raise BadPolicy(f"at most {MAX_ARMS} programs share the requests beside the current one")
        programs = [base, *(program for program, _ in shares)]
        if len({program.spec for program in programs}) < len(programs):
            raise BadPolicy("a program is named twice, or is the current one, which has the rest anyway")
        all_percents = [100 - sum(percents), *percents]
        self.arms = tuple(
            Arm(program, percent, Results(program.spec))
            for program, percent in zip(programs, all_percents, strict=True)
        )
        self.ended = False
        self._num_picked = 0

    def pick(self) -> BoundProgram:
        """The program for the next request: of many in a row, each arm gets its percentage, give or take two."""
        self._num_picked += 1
        place = self._num_picked * _STRIDE % 1 * 100
        # The current program comes last, so that rounding errors of the sum fall to it.
        for arm in self.arms[1:]:
            if place < arm.percent:
                return arm.program
            place -= arm.percent
        return self.arms[0].program

    def add(self, program: BoundProgram, trace: Trace) -> None:
        """A request that `program` served has ended; nothing if it is no arm. Requests that end late count, too."""
        for arm in self.arms:
            if arm.program is program:
                arm.results.add(trace)
