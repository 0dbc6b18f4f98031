"""A step is under way while the next is planned: what ends meanwhile keeps its pages until nothing touches them."""

from __future__ import annotations

import pytest

from services.engine.sampling.params import SamplingParams
from tests.engine.core.answers import Clock
from tests.engine.core.world import Node, World, prompt_of

pytestmark = pytest.mark.parametrize("lag", [1], ids=["late"], indirect=True)


def node(**options: int) -> Node:
    return Node(Clock(), None, "E", **options)


def test_the_next_step_is_launched_before_the_tokens_of_this_one_are_known() -> None:
    engine, prompt = node(), prompt_of(5)
    stream = engine.generate(prompt, SamplingParams(max_tokens=3))
    engine.step()
    assert (len(engine.fake.plans), stream.tokens) == (1, [])
    engine.step()
    (segment,) = engine.fake.plans[1].segments
    assert (segment.follows, segment.begin, segment.end, list(segment.token_ids)) == (True, 5, 6, [])
    assert stream.tokens == engine.expected(prompt, 1)
    engine.run()
    assert stream.tokens == engine.expected(prompt, 3)
    assert len(engine.fake.plans) == 3, "nothing is computed after the last token that max_tokens allows"
    engine.assert_idle()


def test_a_token_that_was_computed_after_a_stop_is_dropped_and_its_page_comes_back() -> None:
    engine, prompt = node(), prompt_of(7)
    expected = engine.expected(prompt, 9)
    stop = next(token for n, token in enumerate(expected) if n and token not in expected[:n])
    length = expected.index(stop) + 1
    stream = engine.generate(prompt, SamplingParams(max_tokens=9, stop_token_ids=(stop,)))
    while not stream.has_ended:
        engine.step()
    assert stream.tokens == expected[:length]
    assert len(engine.fake.plans) == length + 1
    assert engine.pages.held == engine.config.num_pages_for(len(prompt) + length), "the step after still writes there"
    engine.run()
    engine.assert_idle()


def test_pages_of_a_cancelled_sequence_are_nobody_elses_while_a_step_writes_them() -> None:
    engine = node(num_pages=16)
    engine.generate(prompt_of(10), SamplingParams(max_tokens=30), name="cancelled")
    engine.step()
    (under_way,) = engine.fake.plans
    engine.cancel("cancelled")
    other = engine.generate(prompt_of(9, start=1), SamplingParams(max_tokens=2))
    engine.step()
    taken = {page for segment in engine.fake.plans[1].segments for page in segment.page_ids}
    assert not taken & {page for segment in under_way.segments for page in segment.page_ids}
    engine.run()
    assert other.tokens == engine.expected(prompt_of(9, start=1), 2)
    engine.assert_idle()


def test_a_failed_step_ends_its_sequences_and_no_others() -> None:
    engine = node()
    first = engine.generate(prompt_of(5), SamplingParams(max_tokens=8))
    engine.step()
    second = engine.generate(prompt_of(6, start=1), SamplingParams(max_tokens=8))
    engine.fake.fail_next = RuntimeError("the device says no")
    engine.step()
    engine.run()
    assert first.failure.reason == "STEP_FAILED"
    assert second.tokens == engine.expected(prompt_of(6, start=1), 8)
    engine.assert_idle()


def test_a_sequence_short_of_pages_waits_for_the_step_under_way_before_it_preempts() -> None:
    engine = node(num_pages=12, max_context=40)
    prompts = [prompt_of(12, start=n) for n in range(3)]
    streams = [engine.generate(prompt, SamplingParams(max_tokens=20)) for prompt in prompts]
    engine.run()
    assert [stream.tokens for stream in streams] == [engine.expected(prompt, 20) for prompt in prompts]
    assert sum(stream.timing.preemptions for stream in streams if stream.timing) > 0
    engine.assert_idle()


def test_stopping_waits_for_the_step_under_way() -> None:
    engine = node()
    stream = engine.generate(prompt_of(5), SamplingParams(max_tokens=8))
    engine.step()
    computed = engine.fake.num_tokens_computed
    engine.core.stop()
    assert engine.fake.num_tokens_computed == computed + 5
    assert stream.error is not None


def test_no_load_is_reported_idle_while_a_step_is_under_way() -> None:
    engine = node()
    engine.generate(prompt_of(5), SamplingParams(max_tokens=1))
    assert engine.step()
    assert engine.core.load().running_sequences == 1
    engine.run()
    engine.assert_idle()


def test_tokens_are_heard_before_the_step_behind_theirs_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step with a piece to send is settled at once, behind the one that was under way, and each gives a token."""
    world, prompt, sent = World(), prompt_of(5), prompt_of(12, start=1)
    reserved = world.reserve(sent, 12)
    stream, heard = world.p.generate(prompt, SamplingParams(max_tokens=8)), []
    world.p.step()
    answer = world.p.remote_send(sent, 0, 12, reserved)
    finish = world.p.fake.finish
    monkeypatch.setattr(world.p.fake, "finish", lambda step: heard.append(len(stream.tokens)) or finish(step))
    world.p.step()
    assert (heard, len(stream.tokens)) == ([0, 1], 2)
    monkeypatch.undo()
    world.run()
    assert answer.value.computed_tokens == 12
    assert stream.tokens == world.p.expected(prompt, 8)
    world.p.assert_idle()
