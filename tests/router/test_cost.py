"""Speeds fitted to synthetic accounts, and placements weighed with them: pure, on data made up here."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import pytest

from services.protocol.ranges import TokenRange
from services.protocol.timing import Timing
from services.router.cost.book import FIRST_GUESS_OUTPUT, CostBook
from services.router.cost.decision import MAX_ALTERNATIVES, Decision
from services.router.cost.least_squares import LeastSquares
from services.router.cost.placement import Pattern, Placement, Planner
from services.router.cost.speeds import PREFILL_S_PER_TOKEN, DecodeWork, EngineSpeeds, PrefillWork, SendWork, StepsWork
from services.router.errors import NoEngine
from services.router.fleet.cached_blocks import CachedBlocks, KvEvent
from services.router.fleet.info import EngineInfo, EngineSnapshot, InFlight, Load, WorkDone
from services.router.fleet.underway import Answer
from services.router.request import ModelKey, PolicyRequest
from services.router.values import Sampling

MODEL = ModelKey("m", b"weights", b"tokens")
PAGE = 16
TOKEN_S, STEP_S, SEQUENCE_S = 2e-3, 30e-3, 4e-3


def snapshot(name: str, load: Load | None = None, **info: object) -> EngineSnapshot:
    described = EngineInfo(
        name=name,
        incarnation=name.encode(),
        contract_version="1.0",
        model=MODEL,
        page_size=PAGE,
        max_context=100_000,
        vocab_size=1000,
        max_batch_size=32,
        can_transfer=True,
    )
    load = load or Load(usable_pages=10_000)
    others = InFlight(load.sequences, load.queued_tokens)
    return EngineSnapshot(f"{name}:1", replace(described, **info), load, InFlight(), CachedBlocks(), others=others)


def request(length: int = 1024, output: int = 32) -> PolicyRequest:
    sampling = Sampling(max_tokens=output, ignore_eos=True)
    return PolicyRequest("r", MODEL, tuple(range(length)), sampling)


def cache(engine: EngineSnapshot, asked: PolicyRequest, tokens: int) -> None:
    stored = tuple(asked.block_hashes(PAGE)[: tokens // PAGE])
    engine.blocks.apply(KvEvent(1, snapshot=True, snapshot_complete=True, stored=stored))


def prefill_s(tokens: int) -> float:
    return TOKEN_S * tokens


def step_s(sequences: float) -> float:
    return STEP_S + SEQUENCE_S * sequences


def measured(
    *engines: EngineSnapshot, factor: float = 1.0, book: CostBook | None = None, spread: float = 0.05, seed: int = 1
) -> CostBook:
    """A book in which each engine has told of many steps of every kind, `factor` times slower than the above, give or
    take a share of `spread`."""
    book, source = book or CostBook(), random.Random(seed)
    done = {engine.address: WorkDone() for engine in engines}
    for _ in range(60):
        for engine in engines:
            tokens, rows, noise = (
                source.choice((0, 64, 256, 512)),
                source.randrange(8),
                source.uniform(1 - spread, 1 + spread),
            )
            before = done[engine.address]
            done[engine.address] = WorkDone(
                busy_s=before.busy_s + factor * noise * (prefill_s(tokens) + step_s(rows)),
                steps=before.steps + 1,
                prompt_tokens=before.prompt_tokens + tokens,
                prompt_context=before.prompt_context + tokens * source.randrange(1000),
                rows=before.rows + rows,
                row_context=before.row_context + rows * source.randrange(500),
            )
            book.reported(replace(engine, load=replace(engine.load, work=done[engine.address])))
            for other in engines:
                sent = Timing(transferred_bytes=1000 * max(1, tokens), queue_s=0.1)
                elapsed_s = noise * (4e-3 + 1e-5 * max(1, tokens)) + 0.1
                book.sent(engine, other, TokenRange(0, max(1, tokens)), sent, elapsed_s)
    return book


def test_coefficients_are_found() -> None:
    source, model = random.Random(3), LeastSquares((0.0, 1e-4), (1.0, 1e-1))
    for _ in range(100):
        x = source.uniform(1, 1000)
        model.observe((1.0, x), (0.02 + 3e-3 * x) * source.uniform(0.95, 1.05))
    assert model.coefficients[1] == pytest.approx(3e-3, rel=0.05)
    assert model.predict((1.0, 500)) == pytest.approx(1.52, rel=0.05)


def test_the_first_observation_counts_for_nearly_all() -> None:
    model = LeastSquares((PREFILL_S_PER_TOKEN,), (3 * PREFILL_S_PER_TOKEN,))
    model.observe((100.0,), 0.2)
    assert model.predict((100.0,)) == pytest.approx(0.2, rel=0.05)


@pytest.mark.parametrize("factor", [0.001, 30.0, 1000.0])
def test_an_outlier_hardly_matters(factor: float) -> None:
    model = LeastSquares((1e-4,), (1e-1,))
    for _ in range(30):
        model.observe((100.0,), 0.2)
    model.observe((100.0,), 0.2 * factor)
    assert model.predict((100.0,)) == pytest.approx(0.2, rel=0.1)


@pytest.mark.parametrize("factor", [0.2, 5.0])
def test_a_lasting_change_is_believed(factor: float) -> None:
    model = LeastSquares((1e-4,), (1e-1,))
    for _ in range(200):
        model.observe((100.0,), 0.2)
    for _ in range(60):
        model.observe((100.0,), 0.2 * factor)
    assert model.predict((100.0,)) == pytest.approx(0.2 * factor, rel=0.2)


@pytest.mark.parametrize("seed", range(4))
def test_slow_observations_count_as_much_as_quick_ones(seed: int) -> None:
    source, model, found = random.Random(seed), LeastSquares((1e-4,), (1e-1,)), list[float]()
    for number in range(400):
        model.observe((100.0,), 0.2 * source.lognormvariate(-0.08, 0.4))  # 0.2 on average
        if number > 50:
            found.append(model.predict((100.0,)))
    assert fmean(found) == pytest.approx(0.2, rel=0.05)


def test_more_work_never_takes_less_time() -> None:
    model = LeastSquares((0.0, 1e-3, 0.0), (1.0, 1e-2, 1e-2))
    source = random.Random(5)
    for _ in range(200):
        x = (1.0, source.uniform(1, 100), source.uniform(1, 100))
        model.observe(x, max(1e-3, 1.0 - 5e-3 * x[2]))
        assert min(model.coefficients) >= 0


@pytest.mark.parametrize("seed", range(5))
def test_thousands_of_observations_stay_numerically_sound(seed: int) -> None:
    """Features as they come: a constant, a few sequences, thousands of tokens of context, the last two correlated."""
    source, speeds, errors = random.Random(seed), EngineSpeeds(), list[float]()
    for number in range(3000):
        sequences = source.randrange(1, 12)
        work = DecodeWork(sequences, sequences * source.uniform(300, 500))
        seconds = step_s(sequences) + 1e-6 * work.context
        if number > 20:
            errors.append(abs(speeds.step_s(work) / seconds - 1))
        luck = source.choice((0.5, 1, 1, 1, 1, 1, 1, 1, 1, 40)) if number > 20 else 1
        steps = StepsWork(1, rows=work.sequences, row_context=work.context)
        speeds.steps.observe(steps.features, seconds * luck * source.uniform(0.9, 1.1))
    errors.sort()
    assert errors[len(errors) // 2] < 0.05
    assert errors[int(0.99 * len(errors))] < 0.2
    assert errors[-1] < 0.5


def test_forgetting_does_not_make_the_unobserved_uncertain_without_bound() -> None:
    model = LeastSquares((0.01, 1e-3), (1.0, 1e-2))
    for _ in range(5000):
        model.observe((1.0, 0.0), 0.05)
    model.observe((1.0, 10.0), 0.06)
    assert model.predict((1.0, 0.0)) == pytest.approx(0.05, rel=0.05)
    assert model.coefficients[1] <= 1e-2


def test_speeds_of_engines_and_links_are_measured() -> None:
    fast, slow = snapshot("fast"), snapshot("slow")
    book = measured(slow, factor=3.0, book=measured(fast))
    for engine, factor in ((fast, 1.0), (slow, 3.0)):
        speeds = book.engine(engine)
        for tokens in (128, 512):
            expected = factor * prefill_s(tokens)
            assert speeds.prefill_s(PrefillWork(tokens, 0)) == pytest.approx(expected, rel=0.1)
        for sequences in (1, 4, 8):
            assert speeds.step_s(DecodeWork(sequences, 500)) == pytest.approx(factor * step_s(sequences), rel=0.1)
    link = book.link(fast, fast)
    assert link.send_s(SendWork(cached=1000, computed=0)) == pytest.approx(14e-3, rel=0.1)
    assert link.bytes_per_s == pytest.approx(1e8, rel=0.2)
    assert book.link(fast, slow).bytes_per_s is None
    assert book.link(fast, slow).send_s(SendWork(100, 0)) > 0


def test_equal_engines_stay_equal_however_noisy_their_steps_are() -> None:
    one, other = snapshot("one"), snapshot("other")
    book = measured(one, other, spread=0.6)
    speeds = book.engine(one)
    assert book.engine(other) is speeds
    assert speeds.step_s(DecodeWork(4, 500)) == pytest.approx(step_s(4), rel=0.2)
    # Without noise every difference is one.
    unlike = measured(other, factor=1.2, spread=0.01, book=measured(one, spread=0.01))
    assert unlike.engine(other) is not unlike.engine(one)


@pytest.mark.parametrize("other_work", [False, True])
def test_equal_engines_are_alike_without_any_noise(other_work: bool) -> None:
    one, other = snapshot("one"), snapshot("other")
    book = measured(one, spread=0.0)
    measured(other, spread=0.0, book=book, seed=2 if other_work else 1)
    assert book.engine(other) is book.engine(one)


def test_an_engine_that_becomes_slower_than_the_others_is_found_out() -> None:
    one, other = snapshot("one"), snapshot("other")
    book = measured(one, other, spread=0.4)
    book = measured(other, factor=2.0, spread=0.4, book=book)
    ratio = book.engine(other).step_s(DecodeWork(4, 500)) / book.engine(one).step_s(DecodeWork(4, 500))
    assert ratio == pytest.approx(2.0, rel=0.25)


def test_a_new_engine_is_taken_to_be_like_the_others() -> None:
    book = measured(snapshot("a"))
    speeds = book.engine(snapshot("b"))
    assert speeds.prefill_s(PrefillWork(512, 0)) == pytest.approx(prefill_s(512), rel=0.1)
    other = replace(snapshot("c").info, model=ModelKey("n", b"others", b""))
    assert book.engine(replace(snapshot("c"), info=other)).prefill_s(PrefillWork(512, 0)) == pytest.approx(
        512 * PREFILL_S_PER_TOKEN
    )


def test_an_engine_that_restarts_is_measured_anew() -> None:
    book, engine = CostBook(), snapshot("a")
    measured(engine, factor=50.0, book=book)
    measured(snapshot("b"), book=book)
    restarted = replace(engine, info=replace(engine.info, incarnation=b"another"))
    assert book.engine(restarted).prefill_s(PrefillWork(512, 0)) == pytest.approx(prefill_s(512), rel=0.1)


def test_reports_that_say_nothing_are_left_out() -> None:
    engine, book = snapshot("a"), CostBook()
    done = WorkDone(busy_s=5.0, steps=7, rows=7)
    # The first, the same again, and the first of an engine that began anew under the same name.
    for work in (done, done, WorkDone(busy_s=1.0, steps=1, rows=1)):
        book.reported(replace(engine, load=Load(work=work)))
    book.sent(engine, engine, TokenRange(0, 4), Timing(queue_s=1.0), 0.5)
    book.reserved(engine, 0.0)
    assert book.engine(engine).steps.num_observations == 0
    assert book.link(engine, engine).send.num_observations == 0


def test_a_prompt_that_shared_its_steps_is_not_taken_for_a_slow_one() -> None:
    """Twelve prompts at once: each waited for all of them, and the engine was as fast as ever."""
    engine, book = snapshot("a"), CostBook()
    for steps in range(1, 40):
        tokens = 512 * (steps % 3)
        total = sum(512 * (step % 3) for step in range(1, steps + 1))
        busy_s = sum(step_s(4) + prefill_s(512 * (step % 3)) for step in range(1, steps + 1))
        work = WorkDone(busy_s, steps, total, 0, 4 * steps, 0)
        book.reported(replace(engine, load=Load(work=work, queued_tokens=12 * tokens)))
    speeds = book.engine(engine)
    assert speeds.prefill_s(PrefillWork(512, 0)) == pytest.approx(prefill_s(512), rel=0.05)
    assert speeds.step_s(DecodeWork(4, 0)) == pytest.approx(step_s(4), rel=0.05)


def test_output_is_expected_to_be_as_long_as_of_late() -> None:
    book = CostBook()
    asked = request(output=1000)
    assert book.expected_output(asked) == 1000  # it ignores the end of sequence
    asked = replace(asked, sampling=Sampling(max_tokens=1000))
    assert book.expected_output(asked) == FIRST_GUESS_OUTPUT
    assert book.expected_output(replace(asked, num_generated=60)) == FIRST_GUESS_OUTPUT - 60
    assert book.expected_output(replace(asked, num_generated=600)) == 1
    for _ in range(200):
        book.answered(10)
    assert book.expected_output(asked) == pytest.approx(10, rel=0.05)
    assert book.expected_output(replace(asked, sampling=Sampling())) == pytest.approx(10, rel=0.05)


def best(engines: Sequence[EngineSnapshot], asked: PolicyRequest | None = None) -> Placement:
    return Planner(measured(*engines), asked or request(), engines).placements()[0]


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
    [held] = Planner(measured(engine), request(512), [engine]).placements()
    assert held.hold_s == pytest.approx(3 * step_s(3), rel=0.1)
    assert held.delay_s < 0.1 * prefill_s(512)
    [waited] = Planner(measured(engine), request(512), [engine], held_s=1.0).placements()
    assert waited.hold_s == 1.0, "as long as computing it takes is the most"
    assert waited.delay_s > 2.6 * prefill_s(512)


def test_a_prompt_is_not_kept_back_for_long_or_for_little() -> None:
    for engine in (answering("a", 400, 400), answering("a", 40), busy("a", 4)):
        [placement] = Planner(measured(engine), request(512), [engine]).placements()
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
    placements = Planner(measured(*engines), request(4096, 4), engines).placements()
    alone = {each.decode.info.name: each for each in placements if each.prefill is None}
    assert alone["a"].delay_s > 12 * prefill_s(4096) * 0.8
    split = next(each for each in placements if each.decode.info.name == "a" and each.pattern is Pattern.DISAGGREGATED)
    assert split.delay_s < alone["a"].delay_s / 10
    assert split.cost_s < alone["a"].cost_s


def test_two_busy_engines_share_a_long_prompt() -> None:
    """What each has waiting differs, so the best split lies in between."""
    planner = Planner(measured(busy("a", 0), busy("b", 0)), request(8192, 2), [busy("a", 0), busy("b", 0, 9000)])
    placements = planner.placements()
    assert placements[0].decode.info.name == "a"
    splits = {each.split for each in placements if each.prefill is not None and each.decode.info.name == "b"}
    assert len(splits) >= 8
    assert all(split % PAGE == 0 or split == 8191 for split in splits)


def test_every_static_pattern_is_among_the_choices() -> None:
    asked, engines = request(), [busy("a", 1), busy("b", 1), snapshot("c", can_transfer=False)]
    cache(engines[0], asked, 512)
    placements = Planner(CostBook(), asked, engines).placements()
    assert {each.pattern for each in placements} == set(Pattern)
    pairs = {(each.decode.info.name, each.prefill.info.name) for each in placements if each.prefill is not None}
    assert pairs == {("a", "b"), ("b", "a")}
    for kind in (True, False):
        costs = [each.cost_s for each in placements if (each.prefill is None) is kind]
        assert costs == sorted(costs)


def test_an_engine_without_room_comes_last() -> None:
    engines = [snapshot("a", Load(usable_pages=3)), busy("b", 20, 50_000)]
    placements = Planner(CostBook(), request(), engines).placements()
    assert placements[0].decode.info.name == "b"
    assert placements[-1].decode.info.name == "a"


def test_no_engine_is_said() -> None:
    with pytest.raises(NoEngine):
        Planner(CostBook(), request(), [])


def test_a_prompt_of_one_token_goes_somewhere() -> None:
    assert best([snapshot("a"), snapshot("b")], request(1)).prefill is None


def test_many_engines_are_weighed_without_weighing_all_pairs() -> None:
    engines = [busy(f"e{number}", number % 7, number * 10) for number in range(200)]
    placements = Planner(CostBook(), request(), engines).placements()
    assert 200 < len(placements) < 200 + 3 * 2 + 2 * 9


def test_a_decision_keeps_the_best_of_each_kind_and_no_engine() -> None:
    engines = [busy(name, number) for number, name in enumerate("abcdefghi")]
    placements = Planner(CostBook(), request(), engines).placements()
    decision = Decision.of(placements)
    assert decision.num_weighed == len(placements)
    assert decision.chosen.cost_s == placements[0].cost_s
    assert len(decision.alternatives) == MAX_ALTERNATIVES
    kinds = {(each.pattern, each.decode, each.prefill) for each in decision.alternatives}
    assert len(kinds) == MAX_ALTERNATIVES
