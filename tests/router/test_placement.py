"""Placements weighed with speeds that are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from services.router.cost.book import CostBook
from services.router.cost.decision import MAX_ALTERNATIVES, Decision
from services.router.cost.outlook import Outlook
from services.router.cost.placement import Pattern, Placement, Planner
from services.router.errors import NoEngine
from services.router.fleet.info import EngineSnapshot, Load
from services.router.fleet.underway import Answer
from services.router.request import PolicyRequest
from tests.router.cost_scene import PAGE, cache, measured, prefill_s, request, snapshot, step_s


def best(engines: Sequence[EngineSnapshot], asked: PolicyRequest | None = None) -> Placement:
    return Planner(measured(*engines), asked or request(), engines, Outlook()).placements()[0]


def busy(name: str, running: int, queued: int = 0) -> EngineSnapshot:
    load = Load(running=running, context_tokens=500 * running, queued_tokens=queued, usable_pages=10_000)
    return snapshot(name, load)


def test_an_idle_fleet_computes_where_it_decodes() -> None:
    placement = best([snapshot("a"), snapshot("b")])
    assert (placement.pattern, placement.prefill) == (Pattern.DATA_PARALLEL, None)
    assert placement.ttft_s == pytest.approx(step_s(0) + prefill_s(1024), rel=0.1)
    assert placement.jct_s == pytest.approx(step_s(0) + prefill_s(1024) + 31 * step_s(1), rel=0.1)
    assert placement.delay_s == 0


def test_the_engine_with_less_to_do_is_taken() -> None:
    assert best([busy("a", 3), busy("b", 1)]).decode.info.name == "b"
    assert best([busy("a", 0, 4000), busy("b", 0, 100)]).decode.info.name == "b"


def answering(name: str, *left: float) -> EngineSnapshot:
    """An engine that generates so many tokens yet of each of our sequences."""
    engine = snapshot(name)
    engine.underway.answers.update(map(Answer, left))
    return engine


def test_the_engine_whose_sequences_end_sooner_is_taken() -> None:
    assert best([answering("a", 40, 40), answering("b", 2, 2, 2)], request(16)).decode.info.name == "b"


def test_a_prompt_is_kept_back_while_sequences_are_about_to_end() -> None:
    engine = answering("a", 2, 3, 3)
    [held] = Planner(measured(engine), request(512), [engine], Outlook()).placements()
    assert held.hold_s == pytest.approx(3 * step_s(3), rel=0.1)
    assert held.delay_s < 0.1 * prefill_s(512)
    [waited] = Planner(measured(engine), request(512), [engine], Outlook(), held_s=1.0).placements()
    assert waited.hold_s == 1.0, "as long as computing it takes is the most"
    assert waited.delay_s > 2.6 * prefill_s(512)


def test_a_prompt_is_not_kept_back_for_long_or_for_little() -> None:
    for engine in (answering("a", 400, 400), answering("a", 40), busy("a", 4)):
        [placement] = Planner(measured(engine), request(512), [engine], Outlook()).placements()
        assert placement.hold_s == 0
    assert best([answering("a", 2, 3, 3), snapshot("b")]).decode.info.name == "b"


def test_a_cached_prefix_is_used_where_it_is() -> None:
    asked, engines = request(), [busy("a", 2), busy("b", 2)]
    cache(engines[0], asked, 1008)
    placement = best(engines, asked)
    assert (placement.pattern, placement.decode.info.name) == (Pattern.CACHED, "a")


def test_a_context_moves_from_an_engine_that_is_overloaded() -> None:
    asked, engines = request(), [busy("a", 16, 6000), snapshot("b")]
    cache(engines[0], asked, 1008)
    placement = best(engines, asked)
    assert (placement.pattern, placement.decode.info.name, placement.split) == (Pattern.MIGRATION, "b", 1008)


def test_a_prompt_is_kept_away_from_engines_that_decode_for_many() -> None:
    """b decodes for nobody but has a queue that a long answer would not notice; a decodes for many."""
    engines = [busy("a", 12), busy("b", 0)]
    engines[1] = replace(engines[1], info=replace(engines[1].info, max_batch_size=1))
    short = best(engines, request(output=2))
    assert short.decode.info.name == "b"
    placements = Planner(measured(*engines), request(4096, 4), engines, Outlook()).placements()
    alone = {each.decode.info.name: each for each in placements if each.prefill is None}
    assert alone["a"].delay_s > 12 * prefill_s(4096) * 0.8
    split = next(each for each in placements if each.decode.info.name == "a" and each.pattern is Pattern.DISAGGREGATED)
    assert split.delay_s < alone["a"].delay_s / 10
    assert split.cost_s < alone["a"].cost_s


def test_two_busy_engines_share_a_long_prompt() -> None:
    """What each has waiting differs, so the best split lies in between."""
    planner = Planner(
        measured(busy("a", 0), busy("b", 0)), request(8192, 2), [busy("a", 0), busy("b", 0, 9000)], Outlook()
    )
    placements = planner.placements()
    assert placements[0].decode.info.name == "a"
    splits = {each.split for each in placements if each.prefill is not None and each.decode.info.name == "b"}
    assert len(splits) >= 8
    assert all(split % PAGE == 0 or split == 8191 for split in splits)


def test_every_static_pattern_is_among_the_choices() -> None:
    asked, engines = request(), [busy("a", 1), busy("b", 1), snapshot("c", can_transfer=False)]
    cache(engines[0], asked, 512)
    placements = Planner(CostBook(lambda: 0.0), asked, engines, Outlook()).placements()
    assert {each.pattern for each in placements} == set(Pattern)
    pairs = {(each.decode.info.name, each.prefill.info.name) for each in placements if each.prefill is not None}
    assert pairs == {("a", "b"), ("b", "a")}
    for kind in (True, False):
        costs = [each.cost_s for each in placements if (each.prefill is None) is kind]
        assert costs == sorted(costs)


@pytest.mark.parametrize("usable_pages", [0, 3])
def test_an_engine_without_room_comes_last(usable_pages: int) -> None:
    engines = [snapshot("a", Load(usable_pages=usable_pages)), busy("b", 20, 50_000)]
    placements = Planner(CostBook(lambda: 0.0), request(), engines, Outlook()).placements()
    assert placements[0].decode.info.name == "b"
    assert placements[-1].decode.info.name == "a"


def test_an_engine_that_has_not_told_of_its_pages_is_taken_to_have_some() -> None:
    assert best([snapshot("a", Load()), busy("b", 20, 50_000)]).decode.info.name == "a"


def test_no_engine_is_said() -> None:
    with pytest.raises(NoEngine):
        Planner(CostBook(lambda: 0.0), request(), [], Outlook())


def test_a_prompt_of_one_token_goes_somewhere() -> None:
    assert best([snapshot("a"), snapshot("b")], request(1)).prefill is None


def test_many_engines_are_weighed_without_weighing_all_pairs() -> None:
    engines = [busy(f"e{number}", number % 7, number * 10) for number in range(200)]
    placements = Planner(CostBook(lambda: 0.0), request(), engines, Outlook()).placements()
    assert 200 < len(placements) < 200 + 3 * 2 + 2 * 9


def test_a_decision_keeps_the_best_of_each_kind_and_no_engine() -> None:
    engines = [busy(name, number) for number, name in enumerate("abcdefghi")]
    placements = Planner(CostBook(lambda: 0.0), request(), engines, Outlook()).placements()
    decision = Decision.of(placements)
    assert decision.num_weighed == len(placements)
    assert decision.chosen.cost_s == placements[0].cost_s
    assert len(decision.alternatives) == MAX_ALTERNATIVES
    kinds = {(each.pattern, each.decode, each.prefill) for each in decision.alternatives}
    assert len(kinds) == MAX_ALTERNATIVES
