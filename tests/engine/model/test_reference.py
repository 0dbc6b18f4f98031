"""Logits equal those of Hugging Face transformers in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from services.engine.model.families import FAMILIES
from services.engine.model.loader import load_model
from tests.engine.model.running import (
    BACKENDS,
    RELATIVE_ERROR,
    PagedRunner,
    PagedSequence,
    random_tokens,
    relative_error,
)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

PROMPT_LENGTHS = (1, 17, 500, 3000)
WINDOW = 40
SHAPE = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
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
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
SLIDING = {"sliding_window": WINDOW}
QWEN_SLIDING = {**SLIDING, "use_sliding_window": True, "max_window_layers": 1}
GEMMA = {"query_pre_attn_scalar": 24, **SLIDING}
# (configuration of transformers, what differs from its own defaults and from SHAPE)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama, tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama, biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama 3 rope": ("LlamaConfig", {"rope_parameters": LLAMA3_ROPE}),
    "llama, linear rope": ("LlamaConfig", {"rope_parameters": LINEAR_ROPE}),
    "llama, wide heads": ("LlamaConfig", {"head_dim": 20, "rms_norm_eps": 1e-3}),
    "llama, no grouping": ("LlamaConfig", {"num_key_value_heads": 6}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral, window": ("MistralConfig", SLIDING),
    "qwen2": ("Qwen2Config", {}),
    "qwen2, window": ("Qwen2Config", {**QWEN_SLIDING, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "qwen3, window and biases": ("Qwen3Config", {**QWEN_SLIDING, "attention_bias": True}),
    "gemma": ("GemmaConfig", {}),
    "gemma2": ("Gemma2Config", {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3TextConfig", {**GEMMA, "num_hidden_layers": 7}),
    "gemma3, stretched": ("Gemma3TextConfig", {**GEMMA, "num_hidden_layers": 6, "rope_parameters": GEMMA3_ROPE}),
}


def save_random(folder: Path, config_class: str, changes: dict[str, Any]) -> Any:
    """A random model of transformers, written to `folder` and returned."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**{**SHAPE, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:  # initialised to constants, which would hide mistakes
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    model.eval().save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return model


@torch.inference_mode()
@pytest.mark.parametrize("variant", VARIANTS)
def test_random_model(tmp_path: Path, variant: str) -> None:
    """Prompts of several lengths, some beyond the window: alone, all in one batch, cut into chunks, token by token."""
    reference = save_random(tmp_path, *VARIANTS[variant])
    loaded = load_model(tmp_path, device="cpu", dtype=torch.float32)
    assert loaded.config.eos_token_ids == (2, 3)
    prompts = [random_tokens(length, loaded.config.vocab_size, seed=length) for length in PROMPT_LENGTHS]
    expected = [reference(torch.tensor([prompt])).logits[0] for prompt in prompts]
    for backend in BACKENDS:
        for prompt, logits in zip(prompts, expected, strict=True):
            alone = PagedRunner(loaded.model, backend, num_pages=200).prefill(prompt)
            assert relative_error(alone, logits) < RELATIVE_ERROR, (backend, len(prompt))
        together = PagedRunner(loaded.model, backend, num_pages=300)
        results = together.step([(PagedSequence(prompt), len(prompt)) for prompt in prompts])
        for actual, logits in zip(results, expected, strict=True):
            assert relative_error(actual, logits) < RELATIVE_ERROR, backend
        sequence = PagedSequence(prompts[2])
        pieces = [together.step([(sequence, count)])[0] for count in (1, 15, 33, 200, 231, *[1] * 20)]
        assert relative_error(torch.cat(pieces), expected[2]) < RELATIVE_ERROR, backend


def test_every_native_family_is_compared() -> None:
    import transformers

    compared = {getattr(transformers, name).model_type for name, _ in VARIANTS.values()}
    names = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    assert {names[model_type] for model_type in compared} | {"Gemma3ForConditionalGeneration"} == set(FAMILIES)


@torch.inference_mode()
def test_language_model_of_a_model_that_reads_images(tmp_path: Path) -> None:
    """Its text model computes what it computes alone, wherever it stands in the files."""
    reference = save_random(tmp_path, *VARIANTS["gemma3"])
    alone = load_model(tmp_path, device="cpu", dtype=torch.float32)
    config = json.loads((tmp_path / "config.json").read_text())
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": config, "eos_token_id": [2, 3]}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    weights = load_file(tmp_path / "model.safetensors")
    tokens = random_tokens(60, alone.config.vocab_size)
    expected = reference(torch.tensor([tokens])).logits[0]
    for old, new in (("model.", "language_model.model."), ("model.", "model.language_model.")):
        moved = {name.replace(old, new, 1): tensor for name, tensor in weights.items()}
        save_file({**moved, "vision_tower.patch": np.zeros(3, dtype=np.float32)}, tmp_path / "model.safetensors")
        loaded = load_model(tmp_path, device="cpu", dtype=torch.float32)
        assert relative_error(PagedRunner(loaded.model).prefill(tokens), expected) < RELATIVE_ERROR


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
