"""Rows of the sweep, and what they say about adaptive."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import exp, fsum, log
from statistics import fmean
from typing import Any

from bench.load import Sample

ADAPTIVE = "adaptive"
NUM_RESAMPLES = 2000
_LOWER, _UPPER = int(0.025 * NUM_RESAMPLES), int(0.975 * NUM_RESAMPLES)  # of 95 %


@dataclass(frozen=True, slots=True)
class Run:
    """One policy on one cell (mix and rate) in one repeat. Requests of equal index are the same in every policy."""

    policy: str
    mix: str
    load: float  # share of the capacity measured before
    rate: float  # requests/s
    repeat: int
    elapsed_s: float
    samples: tuple[Sample | None, ...]  # None: refused or failed
    ttft_limit_s: float  # what counts as good
    tpot_limit_s: float
    slowdown: float = 1.0  # of the machine, before or after it, whichever was more
    others: float = 0.0  # share of the processors that processes of others had meanwhile

    @property
    def cell(self) -> tuple[str, float]:
        """Mix and load."""
        return self.mix, self.load


@dataclass(frozen=True, slots=True)
class Row:
    """One run in figures: seconds, requests/s. A request that was refused took as long as the slowest of its cell."""

    policy: str
    mix: str
    load: float
    rate: float
    repeat: int
    requests: int
    refused: int
    ttft_mean: float
    ttft_p99: float
    tpot_mean: float
    tpot_p99: float
    jct_mean: float
    jct_p99: float
    goodput: float
    slowdown: float
    others: float


@dataclass(frozen=True, slots=True)
class Worst:
    """What a refused request is taken to have needed, in seconds: as Sample."""

    first_token_s: float
    per_token_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class Cell:
    """adaptive against the static policy with the least mean JCT of a cell: their ratio, greater than 1 if adaptive is
    faster, with its 95 % interval."""

    mix: str
    load: float
    best_static: str
    speedup: float
    lower: float
    upper: float
    resampled: tuple[float, ...]  # the ratios behind that interval
    # The same, but in each repeat against the policy that was best in the others: the best of several that are equal is
    # the one that was lucky, and `speedup` holds that luck against adaptive. None of a single repeat.
    held_out_speedup: float | None


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """What build/bench/policies.json holds."""
    cells = compare(runs)
    means = sorted(exp(fmean(map(log, ratios))) for ratios in zip(*(cell.resampled for cell in cells), strict=True))
    return {
        "adaptive_speedup_geomean": _geometric_mean([cell.speedup for cell in cells]),
        "adaptive_speedup_geomean_lower": means[_LOWER] if means else None,
        "adaptive_speedup_geomean_upper": means[_UPPER] if means else None,
        "adaptive_worst_cell_upper": min(cell.upper for cell in cells) if cells else None,
        "adaptive_held_out_geomean": _geometric_mean([cell.held_out_speedup for cell in cells]),
        "cells": [{name: value for name, value in asdict(cell).items() if name != "resampled"} for cell in cells],
        "rows": [asdict(row) for row in rows(runs)],
    }


def rows(runs: Sequence[Run]) -> list[Row]:
    """One for each run."""
    return [_row(run, worst(runs, run.cell)) for run in runs]


def worst(runs: Sequence[Run], cell: tuple[str, float]) -> Worst:
    """The slowest of any request of a cell."""
    samples = [sample for run in runs if run.cell == cell for sample in run.samples if sample is not None]
    return Worst(
        first_token_s=max((sample.first_token_s for sample in samples), default=0.0),
        per_token_s=max((sample.per_token_s for sample in samples), default=0.0),
        total_s=max((sample.total_s for sample in samples), default=0.0),
    )


def compare(runs: Sequence[Run]) -> list[Cell]:
    """Every cell that adaptive and at least one static policy ran."""
    cells = []
    for cell in sorted({run.cell for run in runs}):
        slowest = worst(runs, cell).total_s
        times: dict[str, dict[int, list[float]]] = {}
        for run in runs:
            if run.cell == cell:
                jcts = [slowest if sample is None else sample.total_s for sample in run.samples]
                times.setdefault(run.policy, {})[run.repeat] = jcts
        adaptive = times.pop(ADAPTIVE, {})
        complete = [policy for policy, repeats in times.items() if adaptive and repeats.keys() >= adaptive.keys()]
        means = {policy: _mean(times[policy], adaptive) for policy in complete}
        if means:
            best = min(means, key=lambda policy: means[policy])
            speedup = means[best] / _mean(adaptive, adaptive)
            ratios = resampled(times[best], adaptive, f"{cell}")
            lower, upper = sorted(ratios)[_LOWER], sorted(ratios)[_UPPER]
            held_out = _held_out({policy: times[policy] for policy in means}, adaptive)
            cells.append(Cell(*cell, best, speedup, lower, upper, ratios, held_out))
    return cells


def _held_out(statics: dict[str, dict[int, list[float]]], adaptive: dict[int, list[float]]) -> float | None:
    chosen = list[float]()
    for repeat in adaptive:
        others = {other: adaptive[other] for other in adaptive if other != repeat}
        if not others:
            return None
        best = min(statics, key=lambda policy: _mean(statics[policy], others))
        chosen.extend(statics[best][repeat])
    return fmean(chosen) / _mean(adaptive, adaptive)


def resampled(static: dict[int, list[float]], adaptive: dict[int, list[float]], seed: str) -> tuple[float, ...]:
    """NUM_RESAMPLES ratios of means by resampling repeats, and in each of them pairs of equal requests: requests of one
    run share their luck, so treating all as independent would promise too much."""
    source, repeats, ratios = random.Random(seed), sorted(adaptive), list[float]()
    for _ in range(NUM_RESAMPLES):
        totals = [0.0, 0.0]
        for repeat in source.choices(repeats, k=len(repeats)):
            pairs = list(zip(static[repeat], adaptive[repeat], strict=True))
            for pair in source.choices(pairs, k=len(pairs)):
                totals = [total + each for total, each in zip(totals, pair, strict=True)]
        ratios.append(totals[0] / totals[1])
    return tuple(ratios)


def _geometric_mean(ratios: Sequence[float | None]) -> float | None:
    """None unless all are known."""
    known = [ratio for ratio in ratios if ratio is not None]
    return exp(fmean(map(log, known))) if known and len(known) == len(ratios) else None


def _mean(repeats: dict[int, list[float]], of: dict[int, list[float]]) -> float:
    return fmean(time for repeat in of for time in repeats[repeat])


def _row(run: Run, slowest: Worst) -> Row:
    samples = [slowest if sample is None else sample for sample in run.samples]
    good = [
        sample
        for sample in run.samples
        if sample is not None and sample.first_token_s <= run.ttft_limit_s and sample.per_token_s <= run.tpot_limit_s
    ]
    figures = {}
    for name, values in (
        ("ttft", [sample.first_token_s for sample in samples]),
        ("tpot", [sample.per_token_s for sample in samples]),
        ("jct", [sample.total_s for sample in samples]),
    ):
        figures[f"{name}_mean"] = fsum(values) / len(values)
        figures[f"{name}_p99"] = sorted(values)[min(len(values) - 1, int(0.99 * len(values)))]
    return Row(
        policy=run.policy,
        mix=run.mix,
        load=run.load,
        rate=run.rate,
        repeat=run.repeat,
        requests=len(samples),
        refused=run.samples.count(None),
        goodput=len(good) / run.elapsed_s,
        slowdown=run.slowdown,
        others=run.others,
        **figures,
    )
