"""What engines tell of their work, as speeds of engines and links."""

from __future__ import annotations

from dataclasses import replace

import pytest

from services.protocol.ranges import TokenRange
from services.protocol.timing import Timing
from services.router.cost.book import FIRST_GUESS_OUTPUT, CostBook
from services.router.cost.speeds import PREFILL_S_PER_TOKEN, DecodeWork, PrefillWork, SendWork
from services.router.fleet.info import Load, WorkDone
from services.router.request import ModelKey
from services.router.values import Sampling
from tests.router.cost_scene import measured, prefill_s, request, snapshot, step_s


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
    book, engine = CostBook(lambda: 0.0), snapshot("a")
    measured(engine, factor=50.0, book=book)
    measured(snapshot("b"), book=book)
    restarted = replace(engine, info=replace(engine.info, incarnation=b"another"))
    assert book.engine(restarted).prefill_s(PrefillWork(512, 0)) == pytest.approx(prefill_s(512), rel=0.1)


def test_reports_that_say_nothing_are_left_out() -> None:
    engine, book = snapshot("a"), CostBook(lambda: 0.0)
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
    engine, book = snapshot("a"), CostBook(lambda: 0.0)
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
    book = CostBook(lambda: 0.0)
    asked = request(output=1000)
    assert book.expected_output(asked) == 1000  # it ignores the end of sequence
    asked = replace(asked, sampling=Sampling(max_tokens=1000))
    assert book.expected_output(asked) == FIRST_GUESS_OUTPUT
    assert book.expected_output(replace(asked, num_generated=60)) == FIRST_GUESS_OUTPUT - 60
    assert book.expected_output(replace(asked, num_generated=600)) == 1
    for _ in range(200):
        book.answered(asked.model.digest, 10)
        book.answered(b"another", 1000)
    assert book.expected_output(asked) == pytest.approx(10, rel=0.05)
    assert book.expected_output(replace(asked, sampling=Sampling())) == pytest.approx(10, rel=0.05)
