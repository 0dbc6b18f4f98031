"""What engines tell of their work, as an outlook on what they will do."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from services.router.cost.book import LOOK_S, CostBook
from services.router.cost.outlook import FADING_S, Flow, Outlook, Side, look
from services.router.cost.placement import Pattern, Planner
from services.router.cost.speeds import EngineSpeeds, LinkSpeed, StepsWork
from services.router.fleet.info import EngineSnapshot, WorkDone
from services.router.fleet.underway import Answer
from services.router.request import PolicyRequest
from services.router.values import Sampling
from tests.router.cost_scene import MODEL, snapshot

STEP_S, TOKEN_S, ROW_S = 8e-3, 5e-5, 1e-4
PROMPT, OUTPUT = 3000, 100
BUSY = Side(share=0.8, held_up=0.8, num_behind=20.0, wait=4.0)


def speeds() -> EngineSpeeds:
    known = EngineSpeeds()
    # Told exactly what it costs, so often that no guess from before counts.
    for steps, tokens, rows in 40 * ((1, 0, 1), (1, PROMPT, 0), (1, 0, 20), (1, 0, 0)):
        work = StepsWork(steps, tokens, 0, rows, 0)
        known.steps.observe(work.features, STEP_S * steps + TOKEN_S * tokens + ROW_S * rows)
    return known


def doing(prompts_per_s: float, answers_per_s: float, steps_per_s: float = 100.0) -> StepsWork:
    rows = (OUTPUT - 1) * answers_per_s
    return StepsWork(steps_per_s, PROMPT * prompts_per_s, 0, rows, rows * PROMPT)


def test_what_an_engine_does_a_second_is_known_from_the_first_report_and_fades() -> None:
    flow = Flow(0.0)
    for second in range(1, 61):
        flow.add(StepsWork(10.0, 500.0), float(second))
        if second > 3:
            assert flow.per_s(second).prompt_tokens == pytest.approx(500.0, rel=0.2)
    assert flow.per_s(60.0).features == pytest.approx((10.0, 500.0, 0.0, 0.0, 0.0), rel=0.05)
    assert flow.per_s(60.0 + FADING_S).prompt_tokens == pytest.approx(500.0 / math.e, rel=0.1)


def test_who_computes_prompts_already_goes_on_with_it() -> None:
    known = speeds()
    flows = {"a": doing(0.5, 4.0), "b": doing(3.5, 0.2), "c": doing(0.5, 2.0), "d": doing(3.5, 1.8)}
    seen = look(flows, known, LinkSpeed(), OUTPUT, math.inf, Outlook())
    assert seen.prefill_pool == {"b", "c", "d"}
    assert seen.prompt_s == pytest.approx(PROMPT * TOKEN_S + STEP_S, rel=0.1)
    assert seen.in_pool.share > 4 * seen.others.share
    assert seen.slowdown("b") > seen.slowdown("a") >= 1
    # One that has nothing to do is one that does not generate.
    flows["d"] = StepsWork(0.0)
    assert look(flows, known, LinkSpeed(), OUTPUT, math.inf, seen).prefill_pool == {"b", "c", "d"}


@pytest.mark.parametrize(
    "flows",
    [
        {},
        {"a": doing(2.0, 2.0)},
        {"a": StepsWork(0.0), "b": StepsWork(0.0)},
        {"a": doing(2.0, 0.0), "b": doing(2.0, 0.0)},
        {"a": doing(0.0, 2.0), "b": doing(0.0, 2.0)},
    ],
)
def test_where_nothing_can_be_told_all_are_alike(flows: dict[str, StepsWork]) -> None:
    seen = look(flows, speeds(), LinkSpeed(), OUTPUT, math.inf, Outlook(frozenset("a"), BUSY))
    assert seen == Outlook()
    assert (seen.slowdown("a"), seen.num_behind("a", 5.0, 1.0)) == (1.0, 0.0)


def test_an_outlook_fades_away_with_the_traffic() -> None:
    fleet = Fleet("a", "b")
    assert fleet.run(30, a=(2.0, 2.0), b=(2.1, 2.0)) != Outlook()
    for _ in range(200):
        fleet.now_s += 10 * FADING_S
        seen = fleet.book.outlook(MODEL.digest, fleet.engines)
        assert math.isfinite(seen.num_behind("a:1", 1.0, 1.0))
    assert seen == Outlook()


def test_more_come_behind_a_longer_queue() -> None:
    seen = Outlook(frozenset("a"), BUSY, Side(0.2, 0.1, 0.1, 0.2, arrivals_per_s=5.0), prompt_s=0.2)
    usual_s = BUSY.wait * 0.2
    assert seen.num_behind("a", usual_s, 0.2) == pytest.approx(BUSY.num_behind)
    assert seen.num_behind("a", 0.0, 0.2) == pytest.approx(BUSY.num_behind / 5)
    assert seen.num_behind("a", 2 * usual_s, 0.2) == pytest.approx(BUSY.num_behind * 9 / 5)
    # Sequences that come while it is computed, too: half of it is over when they do.
    assert seen.num_behind("b", 0.0, 0.4) - seen.num_behind("b", 0.0, 0.2) == pytest.approx(5.0 * 0.1)
    full = Outlook(frozenset("a"), Side(1e3, 1e3, math.inf, math.inf), prompt_s=0.2)
    assert math.isfinite(full.num_behind("a", 100.0, 1.0))
    assert 1 < full.slowdown("a") < 100


class Fleet:
    """Engines that report every second."""

    def __init__(self, *names: str) -> None:
        self.now_s = 0.0
        self.book = CostBook(lambda: self.now_s)
        self.work = dict.fromkeys(names, WorkDone())
        self.looks = 0
        self.source = random.Random(1)
        for _ in range(200):
            self.book.answered(MODEL.digest, OUTPUT)

    def engines(self) -> Sequence[EngineSnapshot]:
        self.looks += 1
        return [self.snapshot(name) for name in self.work]

    def snapshot(self, name: str) -> EngineSnapshot:
        engine = snapshot(name)
        return replace(engine, load=replace(engine.load, work=self.work[name]))

    def run(self, seconds: int, **prompts_and_answers: tuple[float, float]) -> Outlook:
        for _ in range(seconds):
            self.now_s += 1
            for name, (prompts, answers) in prompts_and_answers.items():
                more, steps = self.source.uniform(0.5, 1.5), self.source.uniform(20, 100)
                done, before = doing(more * prompts, answers / more, steps), self.work[name]
                busy_s = STEP_S * done.steps + TOKEN_S * done.prompt_tokens + ROW_S * done.rows
                self.work[name] = WorkDone(
                    before.busy_s + busy_s,
                    before.steps + int(done.steps),
                    before.prompt_tokens + int(done.prompt_tokens),
                    before.prompt_context,
                    before.rows + int(done.rows),
                    before.row_context + int(done.row_context),
                )
                self.book.reported(self.snapshot(name))
            seen = self.book.outlook(MODEL.digest, self.engines)
        return seen


def divided() -> tuple[Fleet, str, str]:
    """A fleet that did everything everywhere, and who is now to compute prompts, and who is not."""
    fleet = Fleet("a", "b")
    assert fleet.book.outlook(MODEL.digest, fleet.engines) == Outlook()
    [giver] = fleet.run(30, a=(2.0, 2.0), b=(2.1, 2.0)).prefill_pool
    return (fleet, "a", "b") if giver == "a:1" else (fleet, "b", "a")


def test_a_fleet_stays_divided() -> None:
    fleet, giver, taker = divided()
    # What comes of it, less of it, and as much as before on both, are no reasons to change places.
    assert fleet.run(60, **{taker: (0.0, 4.0), giver: (4.0, 0.0)}).prefill_pool == {f"{giver}:1"}
    assert fleet.run(60, **{taker: (0.1, 1.0), giver: (0.9, 0.0)}).prefill_pool == {f"{giver}:1"}
    assert fleet.run(60, **{taker: (2.1, 2.0), giver: (2.0, 2.0)}).prefill_pool == {f"{giver}:1"}
    # That the other one does it is.
    assert fleet.run(60, **{taker: (4.0, 0.0), giver: (0.0, 4.0)}).prefill_pool == {f"{taker}:1"}


def test_where_all_do_everything_nothing_has_a_price() -> None:
    flows = {"a": doing(0.5, 0.1), "b": doing(0.5, 0.1)}
    assert look(flows, speeds(), LinkSpeed(), 2.0, math.inf, Outlook()) == Outlook()


def test_looks_are_a_second_apart_and_by_model() -> None:
    fleet = Fleet("a", "b")
    fleet.run(10, a=(2.0, 2.0), b=(2.0, 2.0))
    assert fleet.looks == 10
    fleet.book.outlook(MODEL.digest, fleet.engines)
    assert fleet.looks == 10
    assert fleet.book.outlook(b"another", list) == Outlook()
    fleet.now_s += LOOK_S
    fleet.book.outlook(MODEL.digest, fleet.engines)
    assert fleet.looks == 11


def test_engines_that_cannot_transfer_are_no_part_of_it() -> None:
    fleet = Fleet("a", "b")
    fleet.run(30, a=(2.0, 2.0), b=(2.0, 2.0))
    alone = [fleet.snapshot("a"), replace(fleet.snapshot("b"), info=replace(snapshot("b").info, can_transfer=False))]
    fleet.now_s += LOOK_S
    assert fleet.book.outlook(MODEL.digest, lambda: alone) == Outlook()


def test_only_what_is_to_come_keeps_answers_away_from_prompts() -> None:
    """By itself a request would rather be computed and answered where fewer are held up."""
    fleet, giver, taker = divided()
    seen = fleet.book.outlook(MODEL.digest, fleet.engines)
    asked = PolicyRequest("r", MODEL, tuple(range(PROMPT)), Sampling(max_tokens=OUTPUT, ignore_eos=True))
    engines = fleet.engines()
    for engine in engines:
        engine.underway.answers.update(Answer(60.0) for _ in range(2 if engine.info.name == giver else 5))
    best = Planner(fleet.book, asked, engines, seen).placements()[0]
    assert (best.pattern, best.decode.info.name) == (Pattern.DISAGGREGATED, taker)
    best = Planner(fleet.book, asked, engines, Outlook()).placements()[0]
    assert (best.pattern, best.decode.info.name) == (Pattern.DATA_PARALLEL, giver)
