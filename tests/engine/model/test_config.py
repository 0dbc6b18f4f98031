"""What is read from config.json, and how nonsense in it is reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from services.engine.attention.form import PLAIN
from services.engine.model.config import LayerConfig, ModelConfig, load_config
from services.engine.model.errors import ModelCorrupt, ModelNotFound, UnsupportedModel
from services.engine.model.rope_config import RopeConfig

LLAMA_1 = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "eos_token_id": 2,
}


def _load(folder: Path, generation: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps({**LLAMA_1, **changes}))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return load_config(folder)


def test_old_files_leave_much_out(tmp_path: Path) -> None:
    config = _load(tmp_path)
    assert (config.num_kv_heads, config.head_dim, config.max_context) == (32, 128, 2048)
    assert (config.norm_eps, config.num_layers) == (1e-6, 32)
    assert set(config.layers) == {LayerConfig(PLAIN, RopeConfig(10000.0))}
    assert config.eos_token_ids == (2,)
    assert (config.query_key_value_bias, config.attention_output_bias, config.mlp_bias) == (False, False, False)
    assert not config.tie_word_embeddings


def test_rope_of_old_and_new_transformers(tmp_path: Path) -> None:
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    expected = RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 8192)
    assert _load(tmp_path, rope_theta=5e5, rope_scaling={"rope_type": "llama3", **llama3}).layers[0].rope == expected
    new = {"rope_type": "llama3", "rope_theta": 5e5, **llama3}
    assert _load(tmp_path, rope_parameters=new).layers[0].rope == expected
    assert _load(tmp_path, rope_scaling={"type": "linear", "factor": 2}).layers[0].rope == RopeConfig(
        1e4, "linear", 2.0
    )


def test_end_tokens_of_the_generation_config_win(tmp_path: Path) -> None:
    assert _load(tmp_path, {"eos_token_id": [5, 6]}).eos_token_ids == (5, 6)


def test_the_file_of_a_wrong_end_token_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelCorrupt, match=r"/config\.json: eos_token_id 32000 is not in the vocabulary"):
        _load(tmp_path, eos_token_id=32000)
    with pytest.raises(ModelCorrupt, match=r"/generation_config\.json: eos_token_id 'x' is not in the vocabulary"):
        _load(tmp_path, {"eos_token_id": ["x"]})
    with pytest.raises(ModelCorrupt, match=r"/config\.json: eos_token_id False is not in the vocabulary"):
        _load(tmp_path, {}, eos_token_id=False)


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["PhiForCausalLM"]}, "architecture PhiForCausalLM is not supported"),
        ({"architectures": None, "model_type": "mamba"}, "architecture mamba"),
        ({"hidden_act": "relu2"}, "activation relu2"),
        ({"layer_types": ["linear_attention"] * 32}, "type linear_attention"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "type yarn"),
        ({"partial_rotary_factor": 0.5}, "part of the head"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
    ],
)
def test_unsupported(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        _load(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": None}, "hidden_size must be an integer from 1 to 2147483647, not None"),
        ({"num_hidden_layers": 4097}, "num_hidden_layers must be an integer from 1 to 4096, not 4097"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_key_value_heads": 5}, "32 attention heads do not divide among 5"),
        ({"head_dim": 31}, "head_dim 31 is odd"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ({"eos_token_id": 32000}, "eos_token_id 32000 is not in the vocabulary"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
    ],
)
def test_nonsense_names_the_file(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelCorrupt, match=words) as raised:
        _load(tmp_path, **changes)
    assert str(tmp_path / "config.json") in str(raised.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00"])
def test_not_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelCorrupt, match=r"config\.json"):
        load_config(tmp_path)


def test_window_as_wide_as_the_context_is_none(tmp_path: Path) -> None:
    assert _load(tmp_path, architectures=["MistralForCausalLM"], sliding_window=2048).max_context == 2048
