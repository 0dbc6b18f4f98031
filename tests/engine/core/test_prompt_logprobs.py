"""Log-probabilities of prompts: each token once, in order, after the KV before it, whatever happens to the sequence."""

from __future__ import annotations

from typing import Any

import pytest

from services.engine.core import api
from services.engine.sampling.params import SamplingParams
from tests.engine.core.answers import Clock
from tests.engine.core.fake_runner import expected_scores
from tests.engine.core.world import Node, World, at_once, prompt_of, ref_of


def node(**options: Any) -> Node:
    return Node(Clock(), None, "E", **options)


def rating(count: int = 1, num_top: int = 0) -> SamplingParams:
    return SamplingParams(max_tokens=count, prompt_logprobs=num_top)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 33, 57])
@pytest.mark.parametrize("max_step_tokens", [1, 5, 64])
def test_every_token_but_the_first_once(length: int, max_step_tokens: int) -> None:
    engine, prompt = node(max_step_tokens=max_step_tokens), prompt_of(length)
    stream = engine.generate(prompt, rating(3, num_top=2))
    engine.run()
    assert stream.prompt_logprobs == expected_scores(prompt)
    assert [tops[0][0] for tops in stream.prompt_tops] == [
        (token + 1) % engine.config.vocab_size for token in prompt[1:]
    ]
    assert stream.tokens == engine.expected(prompt, 3)
    engine.assert_idle()


def test_nobody_who_does_not_ask_is_told() -> None:
    engine = node()
    stream = engine.generate(prompt_of(20), SamplingParams(max_tokens=2, logprobs=1))
    engine.run()
    assert stream.prompt_logprobs == []
    assert not any(segment.score for plan in engine.fake.plans for segment in plan.segments)


def test_what_is_cached_is_computed_again_for_who_asks_and_for_nobody_else() -> None:
    engine, prompt = node(), prompt_of(30)
    engine.generate(prompt, SamplingParams(max_tokens=1))
    engine.run()
    asking, not_asking = engine.generate(prompt, rating(4)), engine.generate(prompt, SamplingParams(max_tokens=4))
    engine.run()
    assert asking.prompt_logprobs == expected_scores(prompt)
    assert (asking.account.matched_tokens, asking.account.computed_tokens) == (0, 30)
    assert not_asking.account.matched_tokens == 28
    assert asking.tokens == not_asking.tokens == engine.expected(prompt, 4)
    engine.assert_idle()


def test_batched_and_preempted_equals_one_by_one() -> None:
    engine = node(num_pages=14, max_step_tokens=7)
    prompts = [prompt_of(length, start=length) for length in (9, 20, 13, 17)]
    streams = [engine.generate(prompt, rating(20, num_top=1)) for prompt in prompts]
    engine.run()
    assert sum(stream.account.preemptions for stream in streams) > 0
    for stream, prompt in zip(streams, prompts, strict=True):
        assert stream.prompt_logprobs == expected_scores(prompt)
        assert stream.tokens == engine.expected(prompt, 20)
    engine.assert_idle()


def test_a_sequence_that_is_preempted_in_its_prompt_goes_on_where_it_was() -> None:
    engine = node(num_pages=11, max_context=36, max_step_tokens=2)
    old, young = prompt_of(8), prompt_of(24, start=1)
    first = engine.generate(old, SamplingParams(max_tokens=25))
    second = engine.generate(young, rating())
    while not any(plan.preempted for plan in engine.fake.plans):
        engine.step()
    assert 0 < len(second.prompt_logprobs) < 23
    engine.run()
    assert second.prompt_logprobs == expected_scores(young)
    assert first.tokens == engine.expected(old, 25)
    assert second.tokens == engine.expected(young, 1)
    engine.assert_idle()


@pytest.mark.parametrize("begin", [0, 1, 2, 12, 13, 29, 30])
def test_a_continuation_tells_the_rest_and_takes_what_is_before_from_the_cache(begin: int) -> None:
    engine, prompt = node(), prompt_of(30)
    engine.generate(prompt, SamplingParams(max_tokens=1))
    engine.run()
    stream = engine.generate(prompt, rating(), prompt_logprobs_begin=begin)
    engine.run()
    assert stream.prompt_logprobs == expected_scores(prompt)[max(begin, 1) - 1 :]
    # The row of the token before the first one told of is needed. 28 tokens are whole pages.
    assert stream.account.matched_tokens == (28 if begin >= 29 else max(begin, 1) - 1)
    assert stream.tokens == engine.expected(prompt, 1)
    engine.assert_idle()


def test_tokens_generated_elsewhere_are_no_prompt() -> None:
    engine, prompt = node(), prompt_of(10)
    whole = engine.expected(prompt, 6)
    stream = engine.generate((*prompt, *whole[:3]), rating(6), prompt_token_count=10)
    engine.run()
    assert stream.prompt_logprobs == expected_scores(prompt)
    assert stream.tokens == whole[3:]


@pytest.mark.parametrize("end", [0, 3, 16, 29, 30])
@pytest.mark.parametrize("begin", [0, 6, 9, 30])
def test_what_was_sent_is_used_as_far_as_nothing_after_it_is_to_be_rated(end: int, begin: int) -> None:
    world, prompt = World(), prompt_of(30)
    reserved = world.reserve(prompt, end)
    world.p.remote_send(prompt, 0, end, reserved)
    world.run()
    stream = world.d.generate(prompt, rating(5), reservation=ref_of(reserved), begin=end, prompt_logprobs_begin=begin)
    world.run()
    assert stream.prompt_logprobs == expected_scores(prompt)[max(begin, 1) - 1 :]
    assert stream.tokens == world.d.expected(prompt, 5)
    if begin == 30:
        assert stream.account.computed_tokens == max(30 - end, 1)
    world.assert_idle()


def test_what_was_sent_and_not_used_is_cached() -> None:
    world, prompt = World(), prompt_of(30)
    reserved = world.reserve(prompt, 29)
    world.p.remote_send(prompt, 0, 29, reserved)
    world.run()
    world.d.generate(prompt, rating(), reservation=ref_of(reserved), begin=29)
    after = world.d.generate(prompt, SamplingParams(max_tokens=1))
    world.run()
    assert after.account.matched_tokens == 28
    world.assert_idle()


@at_once
def test_one_that_asks_while_its_prompt_is_computed_waits_for_nobody() -> None:
    engine, prompt = node(max_step_tokens=64), prompt_of(24)
    streams = [engine.generate(prompt, rating()), engine.generate(prompt, rating())]
    engine.step()
    assert [stream.prompt_logprobs for stream in streams] == [expected_scores(prompt)] * 2
    engine.run()
    engine.assert_idle()


def test_a_first_position_beyond_the_prompt_is_refused() -> None:
    engine = node()
    stream = engine.generate(prompt_of(10), rating(), prompt_logprobs_begin=11)
    whole = engine.generate(prompt_of(10), rating(), prompt_token_count=4, prompt_logprobs_begin=5)
    engine.run()
    assert [each.failure.reason for each in (stream, whole)] == ["INVALID_RANGE"] * 2


@at_once
def test_a_cancelled_one_leaves_nothing() -> None:
    engine = node(max_step_tokens=4)
    stream = engine.generate(prompt_of(20), rating(), name="mine")
    while not stream.prompt_logprobs:
        engine.step()
    assert 0 < len(stream.prompt_logprobs) < 19
    engine.cancel("mine")
    engine.run()
    assert stream.finish_reason == api.FinishReason.CANCELLED
    engine.assert_idle()
