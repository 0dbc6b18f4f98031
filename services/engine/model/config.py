"""The shape of a model, read and checked once from a transformers config.json (GGUF files are converted to one)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from services.engine.model.errors import ModelCorrupt, ModelNotFound, UnsupportedModel

LLAMA_FAMILY = frozenset({"LlamaForCausalLM", "MistralForCausalLM"})


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary positions: the base of the frequencies, and how they are stretched beyond the trained context."""

    theta: float
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0  # how many times the longest wavelengths are stretched
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_context: int = 8192  # tokens


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A Llama-family decoder: RMSNorm before each half, rotary positions, grouped queries, SiLU-gated MLP."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context: int  # tokens, prompt and output together
    norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    eos_token_ids: tuple[int, ...]
    weights_dtype: str  # what the checkpoint was trained in: "float32", "bfloat16" or "float16"

    @property
    def queries_per_kv_head(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def kv_elements_per_token(self) -> int:
        """Elements of KV one token takes over all layers."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim


def load_config(folder: Path) -> ModelConfig:
    """Reads config.json and, where present, generation_config.json, whose end tokens win (as in transformers).

    Raises ModelNotFound without a config.json, ModelCorrupt naming the file, UnsupportedModel naming the model.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelNotFound(f"{folder} holds no config.json, so it is not a model folder.")
    generation_path = folder / "generation_config.json"
    generation = read_json(generation_path) if generation_path.is_file() else {}
    return parse_config(read_json(path), generation, path)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises ModelCorrupt naming it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelCorrupt(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ModelCorrupt(f"{path} holds no JSON object.")
    return value


def parse_config(config: Mapping[str, Any], generation: Mapping[str, Any], path: Path) -> ModelConfig:
    """The validated ModelConfig of a config.json; `path` is for messages only."""
    architecture = _supported_architecture(config)
    fields = _Fields(config, path)
    hidden_size = fields.count("hidden_size")
    num_heads = fields.count("num_attention_heads")
    num_kv_heads = fields.count("num_key_value_heads", default=num_heads)
    head_dim = fields.count("head_dim", default=max(1, hidden_size // num_heads))
    max_context = fields.count("max_position_embeddings", default=2048)
    vocab_size = fields.count("vocab_size")
    if num_heads % num_kv_heads:
        raise ModelCorrupt(f"{path}: {num_heads} attention heads do not divide among {num_kv_heads} kv heads.")
    if head_dim % 2:
        raise ModelCorrupt(f"{path}: head_dim {head_dim} is odd, so rotary positions cannot apply.")
    if (window := config.get("sliding_window")) is not None and window < max_context:
        raise UnsupportedModel(f"{architecture} with a sliding window of {window} tokens is not supported.")
    if (activation := config.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise UnsupportedModel(f"{architecture} with activation {activation} is not supported.")
    if config.get("quantization_config"):
        raise UnsupportedModel(f"{architecture} with quantized safetensors weights is not supported.")
    end_tokens = _token_ids(generation.get("eos_token_id", config.get("eos_token_id")), vocab_size, path)
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.count("intermediate_size"),
        num_layers=fields.count("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_context=max_context,
        norm_eps=fields.positive("rms_norm_eps", default=1e-6),
        rope=_rope(config, max_context, path),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        attention_bias=bool(config.get("attention_bias", False)),
        mlp_bias=bool(config.get("mlp_bias", False)),
        eos_token_ids=end_tokens,
        weights_dtype=_weights_dtype(config),
    )


@dataclass(frozen=True, slots=True)
class _Fields:
    """Checked access to the numbers of one JSON object."""

    values: Mapping[str, Any]
    path: Path

    def count(self, name: str, default: int | None = None) -> int:
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise ModelCorrupt(f"{self.path}: {name} must be a positive integer, not {value!r}.")
        return value

    def positive(self, name: str, default: float | None = None) -> float:
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise ModelCorrupt(f"{self.path}: {name} must be a positive number, not {value!r}.")
        return float(value)


def _supported_architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or []
    name = str(names[0]) if isinstance(names, list) and names else str(config.get("model_type") or "unnamed")
    if name not in LLAMA_FAMILY:
        raise UnsupportedModel(f"The architecture {name} is not supported; this engine runs {_supported_names()}.")
    return name


def _supported_names() -> str:
    return " and ".join(sorted(LLAMA_FAMILY))


def _rope(config: Mapping[str, Any], max_context: int, path: Path) -> RopeConfig:
    """transformers 5 writes rope_parameters; before, rope_theta stood beside an optional rope_scaling."""
    parameters = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    fields = _Fields(parameters, path)
    theta = fields.positive("rope_theta", default=config.get("rope_theta") or 10000.0)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UnsupportedModel("Rotary positions over a part of the head are not supported.")
    match kind:
        case "default":
            return RopeConfig(theta)
        case "linear":
            return RopeConfig(theta, "linear", factor=fields.positive("factor"))
        case "llama3":
            low, high = fields.positive("low_freq_factor"), fields.positive("high_freq_factor")
            if low >= high:
                raise ModelCorrupt(f"{path}: low_freq_factor {low} must be below high_freq_factor {high}.")
            original = fields.count("original_max_position_embeddings", default=max_context)
            return RopeConfig(theta, "llama3", fields.positive("factor"), low, high, original)
    raise UnsupportedModel(f"Rotary position scaling of type {kind} is not supported.")


def _token_ids(value: Any, vocab_size: int, path: Path) -> tuple[int, ...]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token_id in ids:
        if not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
            raise ModelCorrupt(f"{path}: eos_token_id {token_id!r} is not in the vocabulary of {vocab_size} tokens.")
    return tuple(ids)


def _weights_dtype(config: Mapping[str, Any]) -> str:
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    return name if name in ("float32", "bfloat16", "float16") else "float32"
