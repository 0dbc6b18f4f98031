"""Why a request was placed as it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.router.cost.placement import Pattern, Placement

MAX_ALTERNATIVES = 8


@dataclass(frozen=True, slots=True)
class Option:
    """One placement as it was weighed, in plain data: it holds on to nothing of the fleet. Times in seconds."""

    pattern: Pattern
    decode: str  # names of engines
    prefill: str  # empty if there is none
    split: int
    hold_s: float
    wait_s: float
    compute_s: float
    transfer_s: float
    decode_s: float
    delay_s: float
    ttft_s: float
    jct_s: float
    cost_s: float

    @classmethod
    def of(cls, placement: Placement) -> Option:
        """The same without the engines."""
        return cls(
            pattern=placement.pattern,
            decode=placement.decode.info.name,
            prefill="" if placement.prefill is None else placement.prefill.info.name,
            split=placement.split,
            hold_s=placement.hold_s,
            wait_s=placement.wait_s,
            compute_s=placement.compute_s,
            transfer_s=placement.transfer_s,
            decode_s=placement.decode_s,
            delay_s=placement.delay_s,
            ttft_s=placement.ttft_s,
            jct_s=placement.jct_s,
            cost_s=placement.cost_s,
        )


@dataclass(frozen=True, slots=True)
class Decision:
    """The placement that was chosen, and the best of each other kind."""

    chosen: Option
    alternatives: tuple[Option, ...]
    num_weighed: int

    @classmethod
    def of(cls, placements: Sequence[Placement]) -> Decision:
        """Of all that were weighed, the chosen one first. Of every pattern on every pair of engines the cheapest is
        kept, MAX_ALTERNATIVES in all."""
        best: dict[tuple[object, ...], Placement] = {}
        for placement in placements[1:]:
            prefill = None if placement.prefill is None else placement.prefill.address
            best.setdefault((placement.pattern, placement.decode.address, prefill), placement)
        kept = list(best.values())[:MAX_ALTERNATIVES]
        return cls(Option.of(placements[0]), tuple(map(Option.of, kept)), len(placements))
