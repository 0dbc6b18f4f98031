"""The default planner over simulated engines, under traffic whose topics shift: on against off, the same arrivals."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import pytest

from services.router.planning.host import PlannerStatus
from services.router.simulate.fleet import Arrival, simulated_router
from services.router.simulate.hardware import EngineHardware, FleetHardware
from services.rpc.virtual_loop import run

CONTEXT, QUESTION, OUTPUT = 1024, 64, 8  # tokens
PHASE_S, NUM_PHASES, NUM_TOPICS, RATE = 60.0, 2, 6, 1.5
# Each cache holds about two contexts of six, beside what is asked about them.
ENGINE = EngineHardware(usable_pages=200, max_context=1024)
FLEET = FleetHardware({f"engine-{number}": ENGINE for number in range(3)})


@dataclass(frozen=True)
class Outcome:
    """Of one arm."""

    ttft_s: float  # mean
    hit_rate: float  # share of the prompts' tokens that were cached
    planner: PlannerStatus


def shifting(seed: int) -> list[Arrival]:
    """In each phase other topics, Poisson arrivals among them."""
    source, arrivals = random.Random(seed), list[Arrival]()
    for phase in range(NUM_PHASES):
        contexts = [tuple(source.choices(range(1 << 20), k=CONTEXT)) for _ in range(NUM_TOPICS)]
        at_s = phase * PHASE_S
        while (at_s := at_s + source.expovariate(RATE)) < (phase + 1) * PHASE_S:
            question = source.choices(range(1 << 20), k=QUESTION)
            arrivals.append(Arrival(at_s, (*source.choice(contexts), *question), OUTPUT))
    return arrivals


def served(planner: str, arrivals: Sequence[Arrival]) -> Outcome:
    async def main() -> Outcome:
        async with simulated_router(FLEET) as router:
            if planner:
                await router.planners.start(router.planners.library.bind(planner))
            traces = await router.serve("at_home", arrivals)
            assert {trace.code for trace in traces} == {"OK"}
            timings = [trace.legs[-1].timing for trace in traces]
            cached = sum(timing.matched_tokens for timing in timings if timing is not None)
            ttft_s = fmean(trace.first_token_s or 0.0 for trace in traces)
            total = sum(len(arrival.prompt) for arrival in arrivals)
            return Outcome(ttft_s, cached / total, router.planners.status())

    return run(main())


@pytest.mark.slow
def test_topics_at_home_are_found_in_caches_that_cannot_hold_them_all() -> None:
    arrivals = shifting(seed=1)
    off, on = served("", arrivals), served("by_topic", arrivals)
    assert off.planner.num_looks == 0
    assert on.planner.problem == ""
    assert on.planner.outcomes.get("OK", 0) > 0
    assert on.hit_rate > off.hit_rate + 0.1
    assert on.ttft_s < 0.8 * off.ttft_s
    [view] = on.planner.views
    homes = [set(view.homes[topic.name]) for topic in view.topics]
    assert set.union(*homes) == {site.address for site in view.sites}, "all engines are used"
    assert all(len(home) < len(view.sites) for home in homes), "and none holds everything"


@pytest.mark.slow
def test_the_same_traffic_is_planned_for_in_the_same_way() -> None:
    arrivals = shifting(seed=2)
    first, again = served("by_topic", arrivals), served("by_topic", arrivals)
    assert (first.ttft_s, first.hit_rate) == (again.ttft_s, again.hit_rate)
    assert first.planner.moves == again.planner.moves
