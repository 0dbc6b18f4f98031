"""The core with a real model: tiny, float32, one thread. Tokens equal and KV bytes equal whatever way they came."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from services.engine.attention.factory import make_attention
from services.engine.core.config import CoreConfig
from services.engine.core.plan import SampleSpec, ScoreSpec, Segment
from services.engine.core.runner import TorchRunner, make_batch
from services.engine.gpu.runner import QueuedRunner
from services.engine.loading import TORCH_DTYPES
from services.engine.model.loader import LoadedModel, load_model
from services.engine.sampling.params import SamplingParams
from services.protocol.layout import Dtype, PageLayout
from tests.engine.core.answers import Clock
from tests.engine.core.world import Node, World, ref_of
from tests.models import make_tiny_llama

pytestmark = pytest.mark.slow

LAYOUT = PageLayout(4, 2, 16, 8, Dtype.FLOAT32)
OPTIONS = {"layout": LAYOUT, "page_size": 8, "vocab_size": 512, "max_context": 128, "max_step_tokens": 32}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadedModel]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder: Path = make_tiny_llama(tmp_path_factory.mktemp("tiny"))
    yield load_model(folder, device="cpu", dtype=torch.float32)
    torch.set_num_threads(threads)


def pool_of(config: CoreConfig) -> torch.Tensor:
    layout = config.layout
    shape = (layout.layer_count, config.num_pages, 2, layout.kv_head_count, layout.page_size, layout.head_dim)
    return torch.zeros(shape, dtype=TORCH_DTYPES[layout.dtype.value.lower()])


def maker(
    model: LoadedModel, pools: list[torch.Tensor], kind: type[TorchRunner] = TorchRunner
) -> Callable[[CoreConfig], TorchRunner]:
    def make(config: CoreConfig) -> TorchRunner:
        pools.append(pool_of(config))
        return kind(model.model, make_attention("gather_sdpa", pools[-1], model.config), pools[-1])

    return make


def alone(model: LoadedModel, kind: type[TorchRunner] = TorchRunner, **options: Any) -> Node:
    return Node(Clock(), None, "E", make_runner=maker(model, [], kind), **{**OPTIONS, **options})


def prompt_of(length: int, start: int = 0) -> tuple[int, ...]:
    return tuple(3 + (start * 131 + index * 37) % 500 for index in range(length))


def limited(count: int, temperature: float = 0.0) -> SamplingParams:
    return SamplingParams(max_tokens=count, temperature=temperature, seed=5, repetition_penalty=1.1)


@pytest.mark.parametrize("kind", [TorchRunner, QueuedRunner])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_batched_chunked_preempted_and_cached_equal_one_by_one(
    model: LoadedModel, temperature: float, kind: type[TorchRunner]
) -> None:
    params = limited(24, temperature)
    prompts = [prompt_of(length, start=length) for length in (1, 8, 20, 33, 60)]
    expected = []
    for prompt in prompts:
        engine = alone(model, max_step_tokens=128, num_pages=64)
        stream = engine.generate(prompt, params)
        engine.run()
        expected.append(stream.tokens)
    engine = alone(model, kind, num_pages=20, max_step_tokens=24)
    streams = [engine.generate(prompt, params) for prompt in prompts]
    engine.run()
    assert [s.tokens for s in streams] == expected
    assert sum(s.timing.preemptions for s in streams if s.timing) > 0
    again = [engine.generate(prompt, params) for prompt in prompts]
    engine.run()
    assert [s.tokens for s in again] == expected
    assert sum(s.timing.matched_tokens for s in again if s.timing) > 0
    engine.assert_idle()


def test_greedy_alone_equals_greedy_beside_one_that_wants_all_logits(model: LoadedModel) -> None:
    """Where every row wants the largest logit alone, the head gives it; else the sampler finds it."""
    params, answers = SamplingParams(max_tokens=24), []
    for others in ((), (limited(24, 0.8),), (SamplingParams(max_tokens=24, logprobs=2),)):
        engine = alone(model, max_step_tokens=128, num_pages=64)
        stream, *_ = [engine.generate(prompt_of(20), each) for each in (params, *others)]
        engine.run()
        answers.append(stream.tokens)
    assert answers == [answers[0]] * 3
    assert len(set(answers[0])) > 1


@pytest.mark.parametrize("kind", [TorchRunner, QueuedRunner])
def test_a_prompt_is_rated_alike_alone_and_beside_sequences_that_decode(
    model: LoadedModel, kind: type[TorchRunner]
) -> None:
    """Those whose last token nobody knows yet have a row in the batch, too."""
    prompt, params, told = prompt_of(40), SamplingParams(max_tokens=2, prompt_logprobs=1), []
    for num_others in (0, 3):
        engine = alone(model, kind, num_pages=64, max_step_tokens=24)
        for start in range(1, 1 + num_others):
            engine.generate(prompt_of(5, start), limited(30))
        for _ in range(6):
            engine.step()
        stream = engine.generate(prompt, params)
        engine.run()
        assert len(stream.prompt_logprobs) == len(prompt) - 1
        told.append(stream.prompt_logprobs)
    assert np.allclose(told[1], told[0], atol=1e-3)


@pytest.mark.parametrize("kind", [TorchRunner, QueuedRunner])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_disaggregated_equals_single_in_tokens_and_bytes(
    model: LoadedModel, share: float, kind: type[TorchRunner]
) -> None:
    pools: list[torch.Tensor] = []
    world = World(make_runner=maker(model, pools, kind), **OPTIONS)
    for node, pool in zip(world.nodes, pools, strict=True):
        node.service.memory = ByteRows(pool)  # type: ignore[assignment]
    for length in (1, 9, 40, 100):
        prompt = prompt_of(length, start=length)
        single = alone(model, num_pages=64)
        expected = single.generate(prompt, limited(10))
        single.run()
        end = round((length - 1) * share)
        reserved = world.reserve(prompt, end)
        sent = world.p.remote_send(prompt, 0, end, reserved)
        world.run()
        assert sent.value.transferred_tokens == end
        source = world.p.core._context.chain(prompt, "")
        match = world.p.core._context.pool.match(source, end)
        num_full = match.num_tokens // 8
        theirs, ours = match.page_ids[:num_full], reserved.address.shards[0].page_ids[:num_full]
        assert num_full == end // 8
        assert torch.equal(pools[0][:, list(theirs)], pools[1][:, list(ours)])
        stream = world.d.generate(prompt, limited(10), reservation=ref_of(reserved), begin=end)
        world.run()
        assert stream.tokens == expected.tokens
    world.assert_idle()


class ByteRows:
    """A pool as FakeService wants it: [layer, page, offset] is one token's keys and values."""

    def __init__(self, pool: torch.Tensor) -> None:
        self._pool = pool.numpy()
        self.shape = (pool.shape[0], pool.shape[1], pool.shape[4])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, where: tuple[int, int, int]) -> np.ndarray:
        layer, page, offset = where
        return self._pool[layer, page, :, :, offset]

    def __setitem__(self, where: tuple[int, int, int], value: np.ndarray) -> None:
        layer, page, offset = where
        self._pool[layer, page, :, :, offset] = value


def test_a_batch_is_packed_as_the_model_wants_it() -> None:
    from array import array

    segments = [
        Segment(1, 6, [10, 11, 12], array("i", [7, 3, 5]), None),
        Segment(2, 0, [20], array("i", [9]), None, num_single=1),
    ]
    batch = make_batch(segments, 4, torch.device("cpu"))
    assert batch.token_ids.tolist() == [10, 11, 12, 20]
    assert batch.positions.tolist() == [6, 7, 8, 0]
    assert batch.slots.tolist() == [3 * 4 + 2, 3 * 4 + 3, 5 * 4, 9 * 4]
    assert batch.query_starts.tolist() == [0, 3, 4]
    assert batch.context_lengths.tolist() == [9, 1]
    assert batch.block_tables.tolist() == [[7, 3, 5], [9, 0, 0]]
    assert batch.logits_rows.tolist() == []
    assert batch.last is not None
    assert batch.last.rows.tolist() == []
    sample, score = SampleSpec(SamplingParams(), [1], 1), ScoreSpec(1, [5], 0)
    segments = [
        replace(segment, sample=sample, score=wanted) for segment, wanted in zip(segments, (None, score), strict=True)
    ]
    last = make_batch([*segments, replace(segments[0], score=score)], 4, torch.device("cpu")).last
    assert last is not None
    assert last.rows.tolist() == [2, 3, 4, 5, 6]
    assert last.batch.query_starts.tolist() == [0, 1, 2, 5]
    assert make_batch(segments[1:], 4, torch.device("cpu")).last is None
