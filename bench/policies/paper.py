"""python -m bench.policies.paper: what the paper measured on eight GPUs, on simulated engines and in no time.

"A System for Microserving of LLMs" (arXiv 2412.12488) serves Llama-3.1-70B with two engines of four H100 each, 3000
tokens in and 100 out, at 1.6 to 5.6 requests/s. Here a simulated engine takes as long as such GPUs should by their data
sheets; one number is fitted to the paper, `PREFILL_SHARE` of services/router/simulate/hardware.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer

from bench.policies.plot import plot_across
from bench.policies.results import Row, Run, rows, summary
from bench.policies.simulated import cell
from bench.policies.traffic import Mix
from services.router.simulate.hardware import FleetHardware
from services.rpc.virtual_loop import run

MIX = Mix("3000 in, 100 out", 3000, 100)
RATES = "1.6,2.4,3.2,4.0,4.8,5.6"
BASE = "data_parallel"
POLICIES = f"{BASE},disaggregated,balanced:0.1,balanced:0.2,adaptive"
FIGURES = (("ttft_mean", "time to first token, s"), ("tpot_mean", "time per output token, s"), ("jct_mean", "JCT, s"))


def main(
    engines: int = 2,
    policies: Annotated[
        str, typer.Option(help="Comma separated; the first is what others are compared to.")
    ] = POLICIES,
    rates: Annotated[str, typer.Option(help="Requests/s for each two engines.")] = RATES,
    requests: Annotated[int, typer.Option(min=2, help="For each policy, rate and repeat.")] = 300,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    out: Annotated[Path, typer.Option(help="JSON; a picture is drawn beside it.")] = Path("build/bench/paper.json"),
) -> None:
    """Prints each policy over the first one; docs/benchmarks.md has what the paper says."""
    runs = sweep(engines, policies.split(","), [float(each) for each in rates.split(",")], requests, repeats)
    found = summary(runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1))
    plot_across(rows(runs), out.with_suffix(".png"), FIGURES, f"requests/s, {engines} engines")
    for line in table(rows(runs), policies.split(",")):
        print(line)
    print(json.dumps({key: value for key, value in found.items() if key not in ("rows", "cells")}))


def sweep(engines: int, policies: Sequence[str], rates: Sequence[float], requests: int, repeats: int) -> list[Run]:
    """Every policy at every rate, with the same arrivals."""
    fleet = FleetHardware.alike("70b-h100x4", engines)
    return [
        each
        for repeat in range(repeats)
        for rate in rates
        for each in run(cell(fleet, MIX, rate, rate * engines / 2, policies, requests, repeat), math.inf)
    ]


def table(found: Sequence[Row], policies: Sequence[str]) -> list[str]:
    """A line for each rate and policy: means over repeats, over those of the first policy."""
    lines = [f"{'requests/s':>10} {'policy':>16} " + " ".join(f"{name:>10}" for name, _ in FIGURES)]
    for rate in sorted({row.load for row in found}):
        base = mean(found, policies[0], rate)
        for policy in policies:
            ratios = [one / other for one, other in zip(mean(found, policy, rate), base, strict=True)]
            lines.append(f"{rate:>10} {policy:>16} " + " ".join(f"{each:>10.2f}" for each in ratios))
    return lines


def mean(found: Sequence[Row], policy: str, rate: float) -> list[float]:
    """FIGURES of a policy at a rate, in seconds."""
    chosen = [row for row in found if (row.policy, row.load) == (policy, rate)]
    return [fmean(getattr(row, name) for row in chosen) for name, _ in FIGURES]


if __name__ == "__main__":
    typer.run(main)
