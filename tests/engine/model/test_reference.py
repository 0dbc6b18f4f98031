"""Logits equal those of Hugging Face transformers in float32."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from services.engine.model.families import FAMILIES
from services.engine.model.fetch import fetch_model
from services.engine.model.gguf.convert import converted_folder
from services.engine.model.loader import load_model
from tests.engine.model.random_models import VARIANTS, save_random
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


@torch.inference_mode()
@pytest.mark.parametrize("variant", VARIANTS)
def test_random_model(tmp_path: Path, variant: str) -> None:
    """Prompts of several lengths, some beyond the window: alone, all in one batch, cut into chunks, token by token."""
    config_class, changes = VARIANTS[variant]
    # Several times as fast over thousands of tokens as the eager one; it knows no soft caps.
    attention = "eager" if "attn_logit_softcapping" in changes else "sdpa"
    reference = save_random(tmp_path, config_class, changes, attention=attention)
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
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_real_model(name: str) -> None:
    """Each prompt is a prefix of the longest, so the reference computes once; we compute chunks, as an engine does."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = converted_folder(fetch_model(name))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = " ".join(f"Item {n}: the quick brown fox jumps over {n * 37 % 101} lazy dogs." for n in range(300))
    tokens = tokenizer.encode(text)[: max(PROMPT_LENGTHS)]
    assert len(tokens) == max(PROMPT_LENGTHS)
    last_rows = torch.tensor([length - 1 for length in PROMPT_LENGTHS])
    expected = reference(torch.tensor([tokens]), logits_to_keep=last_rows).logits[0]
    del reference

    model = load_model(folder, device="cpu", dtype=torch.float32).model
    for row, length in enumerate(PROMPT_LENGTHS):
        runner = PagedRunner(model, num_pages=200)
        sequence = PagedSequence(tokens[:length])
        while sequence.computed < length:
            work = [(sequence, min(512, length - sequence.computed))]
            hidden = model.forward(runner.batch(work), runner.attention)[-1:]
            sequence.computed += work[0][1]
        assert relative_error(model.logits(hidden)[0], expected[row]) < RELATIVE_ERROR, length
