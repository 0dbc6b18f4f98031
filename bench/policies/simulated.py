"""python -m bench.policies.simulated: the sweep over policies, on simulated engines and in no time."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from bench.load import Sample
from bench.policies.drive import CALIBRATION_REQUESTS
from bench.policies.results import Run, summary
from bench.policies.traffic import MIXES, Mix, arrivals
from services.router.simulate.fleet import Arrival, SimulatedRouter, simulated_router
from services.router.simulate.hardware import HARDWARE, FleetHardware
from services.router.traces import Trace
from services.rpc.virtual_loop import run

EXAMPLES = Path(__file__).resolve().parents[2] / "docs/examples"
POLICIES = "data_parallel,disaggregated,context_aware,balanced:0.5,migrate_then_run,adaptive"
GOOD = 5.0  # times what a request alone takes


def main(
    hardware: Annotated[str, typer.Option(help=f"One of {', '.join(HARDWARE)}.")] = "float32",
    engines: int = 2,
    policies: Annotated[str, typer.Option(help="Comma separated.")] = POLICIES,
    mixes: Annotated[str, typer.Option(help=f"Of {', '.join(MIXES)}.")] = ",".join(MIXES),
    loads: Annotated[str, typer.Option(help="Offered loads as shares of the capacity.")] = "0.2,0.4,0.6,0.8,1.0",
    requests: Annotated[int, typer.Option(min=2, help="For each policy, cell and repeat.")] = 60,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    out: Annotated[Path, typer.Option(help="JSON.")] = Path("build/bench/policies-simulated.json"),
) -> None:
    """As bench.policies, but for the engines and the clock."""
    fleet = FleetHardware.alike(hardware, engines)
    shares = [float(each) for each in loads.split(",")]
    runs = sweep(fleet, policies.split(","), mixes.split(","), shares, requests, repeats)
    found = summary(runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1))
    print(json.dumps({key: value for key, value in found.items() if key != "rows"}))


def sweep(
    fleet: FleetHardware,
    policies: Sequence[str],
    mixes: Sequence[str],
    loads: Sequence[float],
    requests: int,
    repeats: int,
) -> list[Run]:
    """Every policy in every cell, with the same arrivals."""
    runs: list[Run] = []
    for repeat in range(repeats):
        for mix in mixes:
            runs += run(_cells(fleet, MIXES[mix], loads, policies, requests, repeat), math.inf)
    return runs


async def _cells(
    fleet: FleetHardware, mix: Mix, loads: Sequence[float], policies: Sequence[str], requests: int, repeat: int
) -> list[Run]:
    """All loads of a mix under every policy."""
    async with simulated_router(fleet) as router:
        rate, _ = await _calibrate(router, mix)
    runs = []
    for load in loads:
        runs += await cell(fleet, mix, load, load * rate, policies, requests, repeat)
    return runs


async def cell(
    fleet: FleetHardware,
    mix: Mix,
    load: float,
    rate: float,
    policies: Sequence[str],
    requests: int,
    repeat: int,
) -> list[Run]:
    """Every policy with the same arrivals, each with a router that has measured nothing but a few requests."""
    made, runs = _arrivals(mix, rate, requests, f"{repeat}"), []
    for policy in policies:
        async with simulated_router(fleet, [EXAMPLES / "migrate_then_run.py"]) as router:
            _, alone = await _calibrate(router, mix)
            traces = await router.serve(policy, made, salt="measured")
        samples = tuple(map(_sample, traces))
        elapsed_s = max(each.at_s + trace.duration_s for each, trace in zip(made, traces, strict=True))
        good_s = GOOD * alone.first_token_s, GOOD * alone.per_token_s
        runs.append(Run(policy, mix.name, load, rate, repeat, elapsed_s, samples, *good_s))
    return runs


async def _calibrate(router: SimulatedRouter, mix: Mix) -> tuple[float, Sample]:
    """(requests/s with always enough to do, one request alone), data parallel."""
    many = _arrivals(mix, 1.0, CALIBRATION_REQUESTS, "calibration")
    traces = await router.serve("data_parallel", [replace(each, at_s=0.0) for each in many], "busy")
    rate = CALIBRATION_REQUESTS / max(trace.duration_s for trace in traces)
    [alone] = await router.serve("data_parallel", [replace(many[0], at_s=0.0)], "alone")
    sample = _sample(alone)
    assert sample is not None
    return rate, sample


def _arrivals(mix: Mix, rate: float, count: int, seed: str) -> list[Arrival]:
    return [Arrival(each.at_s, each.prompt, each.output_tokens) for each in arrivals(mix, rate, count, seed)]


def _sample(trace: Trace) -> Sample | None:
    if trace.code != "OK" or trace.first_token_s is None:
        return None
    return Sample(trace.first_token_s, trace.duration_s, trace.output_tokens)


if __name__ == "__main__":
    typer.run(main)
