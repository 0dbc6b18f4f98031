"""Models that are not native, through transformers: equal to it over pages, or refused in a sentence."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file, save_file
from torch import Tensor
from transformers.models.olmo2.modeling_olmo2 import Olmo2MLP

from services.engine.model.errors import ModelCorrupt, UnsupportedModel
from services.engine.model.foreign.model import ForeignModel
from services.engine.model.linear.factory import linear_maker
from services.engine.model.linear.form import WeightForm
from services.engine.model.linear.linear import DENSE, DenseLinear, LinearMaker
from services.engine.model.loader import LoadedModel, load_model
from tests.engine.model.random_models import LINEAR_ROPE, WINDOW, save_random
from tests.engine.model.running import (
    BACKENDS,
    RELATIVE_ERROR,
    PagedRunner,
    PagedSequence,
    random_tokens,
    relative_error,
)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

PROMPT_LENGTHS = (1, 17, 300)
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 1024}
QWEN_EXPERTS = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt-neox": ("GPTNeoXConfig", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
    "olmo2": ("Olmo2Config", {}),
    "phi-3, window": ("Phi3Config", {"sliding_window": WINDOW}),
    "granite": ("GraniteConfig", {"logits_scaling": 3.0, "attention_multiplier": 0.2}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "llama, yarn": ("LlamaConfig", {"rope_parameters": YARN}),
    "starcoder2": ("Starcoder2Config", {}),
    "hunyuan, experts": ("HunYuanMoEV1Config", {"num_experts": 4, "moe_topk": 2}),
    "olmoe": ("OlmoeConfig", {"num_experts": 5, "num_experts_per_tok": 3}),
    "qwen2, experts": ("Qwen2MoeConfig", QWEN_EXPERTS),
    "granite, experts": ("GraniteMoeConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt-2": ("GPT2Config", {}),
    "gpt-bigcode": ("GPTBigCodeConfig", {}),
}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "mamba": ("MambaConfig", {"state_size": 4}, "no attention that can be replaced"),
    "gpt-j": ("GPTJConfig", {"rotary_dim": 8}, "no attention that can be replaced"),
    "hybrid": ("Lfm2Config", {"layer_types": ["conv", "full_attention", "conv"]}, "layers without attention"),
    "sinks": ("GptOssConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}, "s_aux"),
    "latent attention": (
        "DeepseekV2Config",
        {**LATENT, "num_key_value_heads": 6, "first_k_dense_replace": 9},
        "values and keys of different size",
    ),
}


TEAM = linear_maker(torch.device("cpu"), torch.float32, 2, WeightForm.PACKED)


def _load(folder: Path, dtype: torch.dtype = torch.float32, linear: LinearMaker = DENSE) -> LoadedModel:
    return load_model(folder, device="cpu", dtype=dtype, linear=linear)


@torch.inference_mode()
@pytest.mark.parametrize("linear", [DENSE, TEAM], ids=["torch", "team"])
@pytest.mark.parametrize("name", MODELS)
def test_equals_transformers(tmp_path: Path, name: str, linear: LinearMaker, caplog: pytest.LogCaptureFixture) -> None:
    reference = save_random(tmp_path, *MODELS[name])
    loaded = _load(tmp_path, linear=linear)
    assert not _warnings(caplog)  # none is left with torch's layers
    assert isinstance(loaded.model, ForeignModel)
    assert loaded.config.eos_token_ids == (2, 3)
    prompts = [random_tokens(length, loaded.config.vocab_size, seed=length) for length in PROMPT_LENGTHS]
    expected = [reference(torch.tensor([prompt])).logits[0] for prompt in prompts]
    for backend in BACKENDS:
        runner = PagedRunner(loaded.model, backend, num_pages=100)
        results = runner.step([(PagedSequence(prompt), len(prompt)) for prompt in prompts])
        for actual, logits in zip(results, expected, strict=True):
            assert relative_error(actual, logits) < RELATIVE_ERROR, backend
        sequence = PagedSequence(prompts[-1])
        pieces = [runner.step([(sequence, count)])[0] for count in (1, 15, 33, 231, *[1] * 20)]
        assert relative_error(torch.cat(pieces), expected[-1]) < RELATIVE_ERROR, backend


def _reading_its_weights(mlp: Any, inputs: Tensor) -> Tensor:
    gate: Tensor = F.linear(inputs, mlp.gate_proj.weight)
    result: Tensor = mlp.down_proj(mlp.act_fn(gate) * mlp.up_proj(inputs))
    return result


@torch.inference_mode()
@pytest.mark.parametrize("fails", ["reads its weights", "differs"])
def test_what_fails_with_the_layers_of_a_team_serves_with_its_own(
    tmp_path: Path, fails: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    linear = TEAM
    if fails == "differs":
        linear = dataclasses.replace(TEAM, make_exact=lambda weight, bias: DenseLinear(1.1 * weight, bias))
    else:
        monkeypatch.setattr(Olmo2MLP, "forward", _reading_its_weights)
    reference = save_random(tmp_path, *MODELS["olmo2"])
    loaded = _load(tmp_path, linear=linear)
    (warning,) = _warnings(caplog)
    assert warning.getMessage() == "linear layers stay torch's, on one thread"
    prompt = random_tokens(17, loaded.config.vocab_size)
    (actual,) = PagedRunner(loaded.model).step([(PagedSequence(prompt), len(prompt))])
    assert relative_error(actual, reference(torch.tensor([prompt])).logits[0]) < RELATIVE_ERROR


def _warnings(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_layers_report_as_they_are_written(tmp_path: Path) -> None:
    save_random(tmp_path, *MODELS["olmo2"])
    runner, seen = PagedRunner(_load(tmp_path).model), []
    sequence = PagedSequence(random_tokens(20, 300))

    def on_layer(layer: int) -> None:
        written = runner.kv[:, sequence.pages].isfinite()
        assert written[: layer + 1, 0].all()
        assert not written[layer + 1 :].any()
        seen.append(layer)

    runner.step([(sequence, 20)], on_layer)
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("name", REFUSED)
def test_what_pages_cannot_hold_is_refused(tmp_path: Path, name: str) -> None:
    config_class, changes, words = REFUSED[name]
    save_random(tmp_path, config_class, changes)
    with pytest.raises(UnsupportedModel, match=words) as raised:
        _load(tmp_path)
    assert "\n" not in str(raised.value)


def test_digest(tmp_path: Path) -> None:
    save_random(tmp_path / "a", *MODELS["olmo2"])
    save_random(tmp_path / "b", *MODELS["olmo2"])
    save_random(tmp_path / "c", "Olmo2Config", {"rope_parameters": LINEAR_ROPE})
    same, other, half = _load(tmp_path / "b"), _load(tmp_path / "c"), _load(tmp_path / "a", torch.bfloat16)
    assert _load(tmp_path / "a").digest == same.digest
    assert len({same.digest, other.digest, half.digest}) == 3


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    save_random(tmp_path, *MODELS["olmo2"])
    path = tmp_path / "model.safetensors"
    weights, content = load_file(path), path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelCorrupt, match=r"model\.safetensors is not a whole safetensors file"):
        _load(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({key: value for key, value in weights.items() if key != name}, path, metadata={"format": "pt"})
    with pytest.raises(ModelCorrupt, match=rf"lacks the tensor {name}"):
        _load(tmp_path)
    save_file({**weights, name: weights[name][1:].copy()}, path, metadata={"format": "pt"})
    with pytest.raises(ModelCorrupt, match=r"another shape|cannot be loaded"):
        _load(tmp_path)


def test_numbers_by_themselves_among_the_weights(tmp_path: Path) -> None:
    """Pythia's files, for one, hold the masked_bias of each layer, a tensor without dimensions."""
    save_random(tmp_path, *MODELS["gpt-neox"])
    plain = _load(tmp_path)
    path = tmp_path / "model.safetensors"
    name = "gpt_neox.layers.0.attention.masked_bias"
    save_file({**load_file(path), name: np.array(-1e9, dtype=np.float32)}, path, metadata={"format": "pt"})
    assert _load(tmp_path).digest != plain.digest


@pytest.mark.parametrize("token", [300, -1, "x"])
def test_end_tokens_are_in_the_vocabulary(tmp_path: Path, token: object) -> None:
    """One that is not would fail every step in which a request of min_tokens holds it back."""
    save_random(tmp_path, *MODELS["olmo2"])
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [2, token]}))
    with pytest.raises(ModelCorrupt, match=f"Olmo2ForCausalLM: eos_token_id {token!r} is not in the vocabulary of 300"):
        _load(tmp_path)


@pytest.mark.parametrize(
    ("name", "model", "field", "most"),
    [
        ("max_position_embeddings", "gpt-neox", "max_position_embeddings", 2**31 - 1),
        ("num_hidden_layers", "gpt-neox", "num_hidden_layers", 4096),
        ("n_layer", "gpt-2", "num_hidden_layers", 4096),
    ],
)
def test_counts_that_no_model_has_are_refused(tmp_path: Path, name: str, model: str, field: str, most: int) -> None:
    """Zero and less would serve and refuse every prompt; layers without end would be made without end."""
    save_random(tmp_path, *MODELS[model])
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    assert name in config
    for wrong in (0, -5, most + 1):
        path.write_text(json.dumps({**config, name: wrong}))
        with pytest.raises(ModelCorrupt, match=f"{field} must be an integer from 1 to {most}, not {wrong}"):
            _load(tmp_path)


def test_unknown_and_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_random(tmp_path, *MODELS["olmo2"])
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        with pytest.raises(UnsupportedModel, match=r"Olmo2ForCausalLM is not supported.*With transformers installed"):
            _load(tmp_path)
    path.write_text(json.dumps({**config, "model_type": "unheard-of", "architectures": ["UnheardOf"]}))
    with pytest.raises(UnsupportedModel, match=r"UnheardOf is not supported.*transformers cannot read it either"):
        _load(tmp_path)
    path.write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(UnsupportedModel, match="quantized safetensors"):
        _load(tmp_path)
    path.write_text(json.dumps({**config, "architectures": ["Olmo2ForSequenceClassification"]}))
    with pytest.raises(UnsupportedModel, match="no causal language model"):
        _load(tmp_path)
