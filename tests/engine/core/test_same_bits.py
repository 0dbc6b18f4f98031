"""The same logits, to the last bit, whatever interrupts a sequence, and wherever its prompt comes from. Else a sampled
answer would go on with other tokens after a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from services.engine.attention.paged_numba import PagedNumbaAttention
from services.engine.core.config import CoreConfig
from services.engine.core.runner import TorchRunner
from services.engine.model.linear.factory import linear_maker
from services.engine.model.linear.form import WeightForm
from services.engine.model.loader import LoadedModel, load_model
from services.engine.sampling.params import SamplingParams
from tests.engine.core.answers import Clock, Stream
from tests.engine.core.test_torch import OPTIONS, ByteRows, pool_of, prompt_of
from tests.engine.core.world import Node, World, ref_of
from tests.models import make_tiny_llama

pytestmark = pytest.mark.slow

PROMPT, NUM_TOKENS = prompt_of(21), 60
SAMPLED = SamplingParams(max_tokens=NUM_TOKENS, temperature=1.0, seed=7, logprobs=4, ignore_eos=True)


@pytest.fixture(scope="module", params=[WeightForm.EXACT, WeightForm.BYTES])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadedModel]:
    threads, cpu = torch.get_num_threads(), torch.device("cpu")
    torch.set_num_threads(1)
    folder: Path = make_tiny_llama(tmp_path_factory.mktemp("tiny"))
    linear = linear_maker(cpu, torch.float32, 1, request.param)
    yield load_model(folder, device=cpu, dtype=torch.float32, linear=linear)
    torch.set_num_threads(threads)


def maker(model: LoadedModel, pools: list[torch.Tensor]) -> Callable[[CoreConfig], TorchRunner]:
    def make(config: CoreConfig) -> TorchRunner:
        pools.append(pool_of(config))
        return TorchRunner(model.model, PagedNumbaAttention(pools[-1]), pools[-1])

    return make


def alone(model: LoadedModel, **options: Any) -> Node:
    defaults = {**OPTIONS, "num_pages": 64, "max_step_tokens": 128}
    return Node(Clock(), None, "E", make_runner=maker(model, []), **{**defaults, **options})


def wired(model: LoadedModel) -> World:
    pools: list[torch.Tensor] = []
    world = World(make_runner=maker(model, pools), **{**OPTIONS, "num_pages": 64})
    for node, pool in zip(world.nodes, pools, strict=True):
        node.service.memory = ByteRows(pool)  # type: ignore[assignment]
    return world


@pytest.fixture(scope="module")
def undisturbed(model: LoadedModel) -> Stream:
    engine = alone(model)
    stream = engine.generate(PROMPT, SAMPLED)
    engine.run()
    assert len(stream.tokens) == NUM_TOKENS
    return stream


@pytest.mark.parametrize("num_got", [1, 13, 40])
@pytest.mark.parametrize("max_step_tokens", [24, 128])
def test_on_another_engine(model: LoadedModel, undisturbed: Stream, num_got: int, max_step_tokens: int) -> None:
    engine, got = alone(model, max_step_tokens=max_step_tokens), undisturbed.tokens[:num_got]
    stream = engine.generate((*PROMPT, *got), SAMPLED, prompt_token_count=len(PROMPT))
    engine.run()
    assert stream.tokens == undisturbed.tokens[num_got:]
    assert stream.logprobs == undisturbed.logprobs[num_got:]


@pytest.mark.parametrize("num_pages", [15, 17])
@pytest.mark.parametrize("length", [17, 21, 26, 30])
def test_after_a_preemption(model: LoadedModel, length: int, num_pages: int) -> None:
    """Of the prompt what fills pages may stay cached, and a rest of one token or more is computed again."""
    prompts = [prompt_of(length), prompt_of(length, start=1)]
    engine = alone(model, num_pages=num_pages)
    streams = [engine.generate(prompt, SAMPLED) for prompt in prompts]
    engine.run()
    assert sum(stream.account.preemptions for stream in streams) > 0
    for prompt, stream in zip(prompts, streams, strict=True):
        second = alone(model)
        expected = second.generate(prompt, SAMPLED)
        second.run()
        assert stream.tokens == expected.tokens
        assert stream.logprobs == expected.logprobs


@pytest.mark.parametrize("max_step_tokens", [1, 3, 7, 20])
def test_in_pieces(model: LoadedModel, undisturbed: Stream, max_step_tokens: int) -> None:
    engine = alone(model, max_step_tokens=max_step_tokens)
    stream = engine.generate(PROMPT, SAMPLED)
    engine.run()
    assert stream.tokens == undisturbed.tokens
    assert stream.logprobs == undisturbed.logprobs


def test_behind_a_cached_prompt(model: LoadedModel, undisturbed: Stream) -> None:
    engine = alone(model)
    for _ in range(2):
        stream = engine.generate(PROMPT, SAMPLED)
        engine.run()
        assert stream.tokens == undisturbed.tokens
        assert stream.logprobs == undisturbed.logprobs
    assert stream.account.matched_tokens == len(PROMPT) - 1


@pytest.mark.parametrize("num_got", [0, 40])
def test_with_kv_that_another_engine_computed(model: LoadedModel, undisturbed: Stream, num_got: int) -> None:
    world = wired(model)
    tokens = (*PROMPT, *undisturbed.tokens[:num_got])
    reserved = world.reserve(tokens, len(tokens) - 1)
    sent = world.p.remote_send(tokens, 0, len(tokens) - 1, reserved, prompt_token_count=len(PROMPT))
    world.run()
    assert sent.value.computed_tokens == len(tokens) - 1
    options = {"reservation": ref_of(reserved), "begin": len(tokens) - 1, "prompt_token_count": len(PROMPT)}
    stream = world.d.generate(tokens, SAMPLED, **options)
    world.run()
    assert stream.tokens == undisturbed.tokens[num_got:]
    assert stream.logprobs == undisturbed.logprobs[num_got:]


@pytest.mark.parametrize("told", [0, 17])
def test_behind_a_context_that_was_sent_whole(model: LoadedModel, undisturbed: Stream, told: int) -> None:
    """As planners ask for it, with a token behind: its last one is in the middle of every prompt that it serves."""
    world, context = wired(model), PROMPT[:16]
    longer = (*context, context[-1])
    world.p.remote_send(longer, 0, len(context), world.reserve(longer, len(context)), prompt_token_count=told)
    world.run()
    stream = world.p.generate(PROMPT, SAMPLED)
    world.run()
    assert stream.account.matched_tokens == len(context)
    assert stream.tokens == undisturbed.tokens
    assert stream.logprobs == undisturbed.logprobs


@pytest.mark.parametrize("is_told", [False, True])
@pytest.mark.parametrize("length", [20, 24, 32, 40])
def test_a_prompt_that_was_sent_whole(model: LoadedModel, length: int, is_told: bool) -> None:
    """Its last token too, with which a page may end that the receiver computes again in one of its own."""
    world, prompt, told = wired(model), prompt_of(length), length if is_told else 0
    engine = alone(model)
    expected = engine.generate(prompt, SAMPLED)
    engine.run()
    reserved = world.reserve(prompt, length)
    world.p.remote_send(prompt, 0, length, reserved, prompt_token_count=told)
    world.run()
    stream = world.d.generate(prompt, SAMPLED, reservation=ref_of(reserved), begin=length, prompt_token_count=told)
    world.run()
    assert stream.tokens == expected.tokens
    assert stream.logprobs == expected.logprobs
    got = 13
    for node in (world.d, world.p):
        stream = node.generate((*prompt, *expected.tokens[:got]), SAMPLED, prompt_token_count=length)
        world.run()
        assert stream.tokens == expected.tokens[got:]
        assert stream.logprobs == expected.logprobs[got:]
