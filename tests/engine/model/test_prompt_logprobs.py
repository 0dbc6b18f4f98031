"""Log-probabilities of prompts equal those of transformers in float32, through the engine's core."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from services.engine.attention.factory import make_attention
from services.engine.core.config import CoreConfig
from services.engine.core.runner import TorchRunner
from services.engine.model.linear.factory import linear_maker
from services.engine.model.loader import LoadedModel, load_model
from services.engine.sampling import score
from services.engine.sampling.params import SamplingParams
from services.protocol.layout import Dtype, PageLayout
from tests.engine.core.answers import Clock, Stream
from tests.engine.core.world import Node
from tests.engine.model.random_models import VARIANTS, save_random
from tests.engine.model.running import random_tokens

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

TOLERANCE = 1e-4
ROUNDING = 1e-5  # of numbers as large as 30
PAGE_SIZE = 16
NUM_TOP = 5


def engine_of(loaded: LoadedModel, *, num_pages: int = 240, max_step_tokens: int = 512, **options: Any) -> Node:
    """The core over a real model, with a pool of NaN."""
    config = loaded.model.config
    layout = PageLayout(config.num_layers, config.num_kv_heads, config.head_dim, PAGE_SIZE, Dtype.FLOAT32)

    def make(core: CoreConfig) -> TorchRunner:
        shape = (config.num_layers, num_pages, 2, config.num_kv_heads, PAGE_SIZE, config.head_dim)
        kv = torch.full(shape, torch.nan)
        return TorchRunner(loaded.model, make_attention(None, kv, loaded.model.config), kv)

    sizes = {"page_size": PAGE_SIZE, "num_pages": num_pages, "max_context": 3300, "vocab_size": config.vocab_size}
    return Node(
        Clock(), None, "E", make_runner=make, layout=layout, max_step_tokens=max_step_tokens, **sizes, **options
    )


def rate(engine: Node, prompts: Sequence[Sequence[int]], num_top: int = NUM_TOP) -> list[Stream]:
    params = SamplingParams(max_tokens=2, prompt_logprobs=num_top, ignore_eos=True)
    streams = [engine.generate(prompt, params) for prompt in prompts]
    engine.run()
    engine.assert_idle()
    return streams


def assert_equal(stream: Stream, prompt: Sequence[int], expected: Tensor) -> None:
    """`expected` are all log-probabilities at all positions, (tokens, vocab)."""
    own = expected[torch.arange(len(prompt) - 1), torch.tensor(prompt[1:], dtype=torch.int64)]
    assert len(stream.prompt_logprobs) == len(prompt) - 1
    assert np.allclose(stream.prompt_logprobs, own, rtol=ROUNDING, atol=TOLERANCE)
    best = expected[: len(prompt) - 1].topk(NUM_TOP).values
    for row, tops in enumerate(stream.prompt_tops):
        # Equals may change places: what is named has the probability that its place has.
        values = expected[row, [token for token, _ in tops]]
        assert np.allclose([value for _, value in tops], values, rtol=ROUNDING, atol=TOLERANCE)
        assert np.allclose(values, best[row], rtol=ROUNDING, atol=TOLERANCE)


@torch.inference_mode()
@pytest.mark.parametrize("variant", VARIANTS)
def test_random_model(tmp_path: Path, variant: str) -> None:
    """Together and in chunks that end anywhere; then again with everything cached, for those who asked for less."""
    reference = save_random(tmp_path, *VARIANTS[variant])
    loaded = load_model(tmp_path, device="cpu", dtype=torch.float32)
    prompts = [random_tokens(length, loaded.config.vocab_size, seed=length) for length in (1, 2, 17, 300, 500)]
    expected = [reference(torch.tensor([prompt])).logits[0].log_softmax(-1) for prompt in prompts]
    engine = engine_of(loaded, max_step_tokens=150)
    for _ in range(2):
        for stream, prompt, logprobs in zip(rate(engine, prompts), prompts, expected, strict=True):
            assert_equal(stream, prompt, logprobs)


@torch.inference_mode()
def test_real_model(smollm2_folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = " ".join(f"Item {n}: the quick brown fox jumps over {n * 37 % 101} lazy dogs." for n in range(60))
    tokens = AutoTokenizer.from_pretrained(smollm2_folder).encode(text)[:700]
    reference = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    expected = reference(torch.tensor([tokens])).logits[0].log_softmax(-1)
    del reference
    engine = engine_of(load_model(smollm2_folder, device="cpu", dtype=torch.float32), num_pages=60)
    (stream,) = rate(engine, [tokens])
    assert_equal(stream, tokens, expected)


class CountingModel:
    """A model that notes how many rows of logits it is asked for at once."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.rows: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def logits(self, hidden: Tensor) -> Tensor:
        self.rows.append(hidden.shape[0])
        return self._model.logits(hidden)


@pytest.mark.parametrize("in_bytes", [False, True])
def test_logits_are_bounded_in_memory_and_a_row_is_the_same_in_any_company(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, in_bytes: bool
) -> None:
    linear = linear_maker(torch.device("cpu"), torch.float32, 1, in_bytes)
    tiny = load_model(tiny_folder, device="cpu", dtype=torch.float32, linear=linear)
    vocab = tiny.config.vocab_size
    prompts = [random_tokens(length, vocab, seed=length) for length in (400, 90, 33)]
    alone = [rate(engine_of(tiny), [prompt])[0] for prompt in prompts]
    counting = CountingModel(tiny.model)
    monkeypatch.setattr(score, "MAX_LOGITS_BYTES", 4 * vocab * 30)
    together = rate(engine_of(replace(tiny, model=counting)), prompts)
    assert max(counting.rows) == 30
    for one, other in zip(alone, together, strict=True):
        assert other.prompt_logprobs == one.prompt_logprobs
        assert other.prompt_tops == one.prompt_tops


def test_three_thousand_tokens_of_a_large_vocabulary_are_rated_in_pieces() -> None:
    assert score.rows_at_once(262_144) * 262_144 * 4 <= score.MAX_LOGITS_BYTES
    assert score.rows_at_once(10**9) == 1
