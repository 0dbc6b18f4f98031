"""adaptive under what real fleets suffer from, on simulated engines: nothing measured yet, reports that are late."""

from __future__ import annotations

import random
from dataclasses import replace
from statistics import fmean

import pytest

from services.router.simulate.fleet import Arrival, simulated_router
from services.router.simulate.hardware import FleetHardware
from services.rpc.virtual_loop import run

NUM_REQUESTS = 80
RATE = 4.0  # requests/s, about 0.7 of what two such engines are able to do


def fleet(report_s: float = 0.1) -> FleetHardware:
    return replace(FleetHardware.alike("int8", 2), report_s=report_s)


def arrivals(seed: int) -> list[Arrival]:
    """Long prompts, short answers."""
    source, made, now_s = random.Random(seed), list[Arrival](), 0.0
    for _ in range(NUM_REQUESTS):
        now_s += source.expovariate(RATE)
        prompt = tuple(source.choices(range(10_000), k=source.randrange(270, 500)))
        made.append(Arrival(now_s, prompt, source.randrange(11, 22)))
    return made


def mean_jct_s(policy: str, hardware: FleetHardware, seed: int, *, warm: bool = False) -> float:
    async def main() -> float:
        async with simulated_router(hardware) as router:
            if warm:
                await router.serve("data_parallel", arrivals(100 + seed)[:20], "warm")
            traces = await router.serve(policy, arrivals(seed))
            assert {trace.code for trace in traces} == {"OK"}
            return fmean(trace.duration_s for trace in traces)

    return run(main())


def speedup(hardware: FleetHardware, *, warm: bool) -> float:
    """Of adaptive over data_parallel, means over three streams of requests."""
    times = [[mean_jct_s(policy, hardware, seed, warm=warm) for seed in range(3)] for policy in PAIR]
    return fmean(times[0]) / fmean(times[1])


PAIR = ("data_parallel", "adaptive")


@pytest.mark.slow
@pytest.mark.parametrize(("report_s", "warm"), [(0.1, True), (0.1, False), (2.0, True), (2.0, False)])
def test_adaptive_is_faster_than_the_best_static_policy(report_s: float, warm: bool) -> None:
    ratio = speedup(fleet(report_s), warm=warm)
    assert ratio > 1.03
