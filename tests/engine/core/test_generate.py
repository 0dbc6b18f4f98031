"""StartGenerate without reservation: every way to the same tokens gives the same tokens."""

from __future__ import annotations

from typing import Any

import pytest

from services.engine.core import api
from services.engine.sampling.params import SamplingParams
from tests.engine.core.answers import Clock
from tests.engine.core.world import GREEDY, PAGE_SIZE, Node, at_once, prompt_of


def node(**options: Any) -> Node:
    return Node(Clock(), None, "E", **options)


def limited(count: int, **options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=count, **options)


def test_one_sequence() -> None:
    engine = node()
    prompt = prompt_of(10)
    stream = engine.generate(prompt, limited(7))
    engine.run()
    assert stream.tokens == engine.expected(prompt, 7)
    assert stream.finish_reason == api.FinishReason.LENGTH
    assert (stream.account.computed_tokens, stream.account.generated_tokens) == (10, 7)
    engine.assert_idle()


@at_once
def test_no_step_follows_the_last_token_of_the_last_sequence() -> None:
    engine = node()
    stream = engine.generate(prompt_of(10), limited(2))
    assert engine.step()
    assert not engine.step()
    assert stream.finish_reason == api.FinishReason.LENGTH
    engine.assert_idle()


def test_batched_equals_one_by_one() -> None:
    engine = node()
    lengths = [1, 3, 4, 5, 9, 16, 17, 20]
    streams = [engine.generate(prompt_of(n, start=n), limited(6)) for n in lengths]
    engine.run()
    assert [s.tokens for s in streams] == [engine.expected(prompt_of(n, start=n), 6) for n in lengths]
    assert any(len(plan.segments) > 4 for plan in engine.fake.plans)
    engine.assert_idle()


@pytest.mark.parametrize("length", [15, 16, 17, 33, 57])
def test_chunked_equals_whole(length: int) -> None:
    chunked, whole = node(max_step_tokens=5), node(max_step_tokens=64)
    streams = [engine.generate(prompt_of(length), limited(5)) for engine in (chunked, whole)]
    chunked.run()
    whole.run()
    assert streams[0].tokens == streams[1].tokens == whole.expected(prompt_of(length), 5)
    assert len(chunked.fake.plans) > len(whole.fake.plans)


@pytest.mark.parametrize("length", [7, 8, 9, 30])
def test_prefix_hit_equals_miss(length: int) -> None:
    engine = node()
    first, second = engine.generate(prompt_of(length), limited(5)), None
    engine.run()
    computed = engine.fake.num_tokens_computed
    second = engine.generate(prompt_of(length), limited(5))
    engine.run()
    assert first.tokens == second.tokens == engine.expected(prompt_of(length), 5)
    assert second.account.matched_tokens == length - 1  # the first one's output published the prompt's last block too
    assert second.account.computed_tokens == 1
    assert engine.fake.num_tokens_computed - computed < length
    engine.assert_idle()


def test_a_partly_matching_page_is_copied_before_it_is_written() -> None:
    engine = node()
    first = engine.generate(prompt_of(12), limited(1))
    engine.run()
    other = (*prompt_of(12)[:6], 49, 48, 47)
    second = engine.generate(other, limited(4))
    engine.run()
    third = engine.generate(prompt_of(12), limited(1))
    engine.run()
    assert second.tokens == engine.expected(other, 4)
    assert second.account.matched_tokens == 6
    assert first.tokens == third.tokens
    assert sum(len(plan.copies) for plan in engine.fake.plans) == 2


def test_salts_share_nothing() -> None:
    engine = node()
    engine.generate(prompt_of(12), limited(1))
    engine.run()
    stream = engine.generate(prompt_of(12), limited(1), cache_salt="tenant")
    engine.run()
    assert stream.account.matched_tokens == 0


def test_a_prefix_being_computed_is_waited_for() -> None:
    engine = node(max_step_tokens=8)
    common = prompt_of(24)
    streams = [engine.generate((*common, 1 + n, n), limited(3)) for n in range(4)]
    engine.run()
    assert [s.tokens for s in streams] == [engine.expected((*common, 1 + n, n), 3) for n in range(4)]
    assert engine.fake.num_tokens_computed < 24 + 4 * (2 + 3) + PAGE_SIZE
    engine.assert_idle()


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temperature=1.0, seed=7)])
def test_preempted_equals_undisturbed(params: SamplingParams) -> None:
    engine = node(num_pages=16, max_context=48)
    params = SamplingParams(temperature=params.temperature, seed=params.seed, max_tokens=20)
    prompts = [prompt_of(10 + n, start=n) for n in range(5)]
    streams = [engine.generate(prompt, params) for prompt in prompts]
    engine.run()
    assert [s.tokens for s in streams] == [engine.expected(prompt, 20, params) for prompt in prompts]
    timings = [s.timing for s in streams if s.timing]
    assert sum(t.preemptions for t in timings) > 0
    assert timings[0].preemptions == 0, "the oldest is never preempted"
    engine.assert_idle()


def test_a_continuation_gives_the_same_tokens() -> None:
    engine, other = node(), node()
    params = SamplingParams(temperature=0.7, seed=3, max_tokens=12)
    whole = engine.generate(prompt_of(9), params)
    engine.run()
    rest = other.generate((*prompt_of(9), *whole.tokens[:5]), params, prompt_token_count=9)
    other.run()
    assert rest.tokens == whole.tokens[5:]
    assert rest.finish_reason == api.FinishReason.LENGTH


def test_the_context_is_the_limit() -> None:
    engine = node(max_context=16)
    stream = engine.generate(prompt_of(10))
    engine.run()
    assert len(stream.tokens) == 6
    assert stream.finish_reason == api.FinishReason.LENGTH


def test_forced_tokens_come_out_and_end_it() -> None:
    engine = node(eos_token_ids=(5,))
    stream = engine.generate(prompt_of(6), limited(1, logprobs=2), forced=(5, 6, 7))
    engine.run()
    assert stream.tokens == [5, 6, 7]
    assert [entry.chosen[0] for entry in stream.logprobs] == [5, 6, 7]
    assert stream.finish_reason == api.FinishReason.LENGTH


def test_end_and_stop_tokens() -> None:
    plain = node()
    tokens = plain.expected(prompt_of(6), 10)
    engine = node(eos_token_ids=(tokens[3],))
    stopped = engine.generate(prompt_of(6), limited(10))
    ignored = engine.generate(prompt_of(6), limited(10, ignore_eos=True))
    held_back = engine.generate(prompt_of(6), limited(10, min_tokens=6, stop_token_ids=(tokens[7],)))
    own = engine.generate(prompt_of(6), limited(10, stop_token_ids=(tokens[1],)))
    engine.run()
    assert (stopped.tokens, stopped.finish_reason) == (tokens[:4], api.FinishReason.STOP)
    assert (ignored.tokens, ignored.finish_reason) == (tokens, api.FinishReason.LENGTH)
    assert (held_back.tokens, held_back.finish_reason) == (tokens[:8], api.FinishReason.STOP)
    assert (own.tokens, own.finish_reason) == (tokens[:2], api.FinishReason.STOP)


@at_once
def test_decoding_is_not_held_up_by_a_long_prompt() -> None:
    engine = node(max_step_tokens=8)
    short = engine.generate(prompt_of(3), limited(20))
    engine.step()
    engine.generate(prompt_of(50, start=1), limited(1))
    for produced in range(2, 8):
        engine.step()
        assert len(short.tokens) == produced


def test_cached_pages_make_room_oldest_first() -> None:
    engine = node(num_pages=16, max_context=64)
    for start in range(6):
        engine.generate(prompt_of(16, start=start), limited(1))
        engine.run()
    assert engine.pages.free < 4
    newest = engine.generate(prompt_of(16, start=5), limited(1))
    oldest = engine.generate(prompt_of(16, start=0), limited(1))
    engine.run()
    assert newest.account.matched_tokens > 0
    assert oldest.account.matched_tokens == 0
    assert oldest.tokens == engine.expected(prompt_of(16, start=0), 1)


def test_many_answers_to_one_prompt_share_its_pages_while_the_first_still_computes_them() -> None:
    engine = node(max_step_tokens=8)
    prompt = prompt_of(30)  # seven full pages of four tokens, computed in four steps, and two tokens
    streams = [engine.generate(prompt, SamplingParams(max_tokens=6, temperature=1.0, seed=seed)) for seed in range(4)]
    engine.step()
    while not any(stream.tokens for stream in streams):
        engine.step()
        assert engine.pages.held <= 7 + 4  # the prompt's pages once, and a last one for each
    engine.run()
    assert [s.tokens for s in streams] == [
        engine.expected(prompt, 6, SamplingParams(temperature=1.0, seed=seed)) for seed in range(4)
    ]
    assert [stream.account.matched_tokens for stream in streams] == [0, 28, 28, 28]
    assert sum(stream.account.computed_tokens for stream in streams) == 30 + 3 * 2
    engine.assert_idle()
