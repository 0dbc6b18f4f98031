"""Logits equal those of Hugging Face transformers in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from services.engine.model.loader import load_model
from tests.engine.model.running import RELATIVE_ERROR, PagedRunner, PagedSequence, random_tokens, relative_error

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

PROMPT_LENGTHS = (1, 17, 500, 3000)
SHAPE = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "initializer_range": 0.3,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama3-rope": {"rope_parameters": LLAMA3_ROPE},
    "linear-rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}},
    "wide-heads": {"head_dim": 20, "rms_norm_eps": 1e-3},
    "no-grouping": {"num_key_value_heads": 6},
}


def _save_random(folder: Path, model: Any) -> Any:
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:  # initialised to ones and zeros, which would hide mistakes
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    model.eval().save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return model


@torch.inference_mode()
def _assert_equal(folder: Path, reference: Any, backend: str) -> None:
    loaded = load_model(folder, device="cpu", dtype=torch.float32)
    tokens = random_tokens(max(PROMPT_LENGTHS), loaded.config.vocab_size)
    for length in PROMPT_LENGTHS:
        expected = reference(torch.tensor([tokens[:length]])).logits[0]
        actual = PagedRunner(loaded.model, backend, num_pages=200).prefill(tokens[:length])
        assert relative_error(actual, expected) < RELATIVE_ERROR, length


@pytest.mark.parametrize("variant", VARIANTS)
def test_random_llama(tmp_path: Path, variant: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    reference = LlamaForCausalLM(LlamaConfig(**{**SHAPE, **VARIANTS[variant]}))
    _save_random(tmp_path, reference)
    loaded = load_model(tmp_path, device="cpu", dtype=torch.float32)
    assert loaded.config.eos_token_ids == (2, 3)
    _assert_equal(tmp_path, reference, "paged_numba" if variant == "plain" else "gather_sdpa")


def test_random_mistral(tmp_path: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    reference = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=None))
    _save_random(tmp_path, reference)
    _assert_equal(tmp_path, reference, "paged_numba")


@torch.inference_mode()
def test_smollm2(smollm2_folder: Path) -> None:
    """Each prompt is a prefix of the longest, so the reference computes once; we compute chunks, as an engine does."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reference = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    text = " ".join(f"Item {n}: the quick brown fox jumps over {n * 37 % 101} lazy dogs." for n in range(300))
    tokens = tokenizer.encode(text)[: max(PROMPT_LENGTHS)]
    assert len(tokens) == max(PROMPT_LENGTHS)
    last_rows = torch.tensor([length - 1 for length in PROMPT_LENGTHS])
    expected = reference(torch.tensor([tokens]), logits_to_keep=last_rows).logits[0]
    del reference

    model = load_model(smollm2_folder, device="cpu", dtype=torch.float32).model
    for row, length in enumerate(PROMPT_LENGTHS):
        runner = PagedRunner(model, num_pages=200)
        sequence = PagedSequence(tokens[:length])
        while sequence.computed < length:
            work = [(sequence, min(512, length - sequence.computed))]
            hidden = model.forward(runner.batch(work), runner.attention)[-1:]
            sequence.computed += work[0][1]
        assert relative_error(model.logits(hidden)[0], expected[row]) < RELATIVE_ERROR, length
