"""The shape of a model, read and checked once from a transformers config.json (GGUF files are converted to one)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from services.engine.attention.form import AttentionForm
from services.engine.model.errors import ModelCorrupt, ModelNotFound, UnsupportedModel
from services.engine.model.families import FAMILIES, FULL, SLIDING, Family
from services.engine.model.json_fields import Fields, read_json
from services.engine.model.rope_config import RopeConfig, rope_by_layer_type

MAX_LAYERS = 4096  # far above any model, and no work to list
Activation = Literal["silu", "gelu", "gelu_tanh"]
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """What differs from layer to layer."""

    attention: AttentionForm
    rope: RopeConfig


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder: RMSNorm before each half, rotary positions, grouped queries, gated MLP."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context: int  # tokens, prompt and output together
    layers: tuple[LayerConfig, ...]
    norm_eps: float
    norm_offset: float  # added to every norm's weight
    query_key_norm: bool  # each head of queries and keys is normed before it is rotated
    post_norms: bool  # what attention and MLP give is normed before it is added
    query_key_value_bias: bool
    attention_output_bias: bool
    mlp_bias: bool
    activation: Activation
    embedding_scale: float
    logits_softcap: float | None  # logits become softcap * tanh(logit / softcap)
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def queries_per_kv_head(self) -> int:
        return self.num_heads // self.num_kv_heads


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


def parse_config(config: Mapping[str, Any], generation: Mapping[str, Any], path: Path) -> ModelConfig:
    """The validated ModelConfig of a config.json; `path` is for messages, which may name the file beside it, too."""
    architecture = _architecture(config)
    family = FAMILIES[architecture]
    if family.text_config:
        config = {**config, **Fields(config, path).part("text_config")}
    config = {**family.defaults, **config}
    fields = Fields(config, path)
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
    if config.get("quantization_config"):
        raise UnsupportedModel(f"{architecture} with quantized safetensors weights is not supported.")
    if config.get("use_bidirectional_attention"):
        raise UnsupportedModel(f"{architecture} with bidirectional attention does not generate text.")
    attention_bias = bool(config.get("attention_bias", False))
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.count("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_context=max_context,
        layers=_layers(config, family, max_context, path),
        norm_eps=fields.positive("rms_norm_eps", default=1e-6),
        norm_offset=family.norm_offset,
        query_key_norm=family.query_key_norm,
        post_norms=family.post_norms,
        query_key_value_bias=attention_bias if family.query_key_value_bias is None else family.query_key_value_bias,
        attention_output_bias=attention_bias and family.query_key_value_bias is None,
        mlp_bias=bool(config.get("mlp_bias", False)),
        activation=_activation(config, family, architecture),
        embedding_scale=hidden_size**0.5 if family.scales_embedding else 1.0,
        logits_softcap=fields.optional_positive("final_logit_softcapping"),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        eos_token_ids=_end_tokens(config, generation, vocab_size, path),
    )


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or []
    name = str(names[0]) if isinstance(names, list) and names else str(config.get("model_type") or "unnamed")
    if name not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UnsupportedModel(f"The architecture {name} is not supported; this engine runs {known}.")
    return name


def _layers(config: Mapping[str, Any], family: Family, max_context: int, path: Path) -> tuple[LayerConfig, ...]:
    """Window and positions of every layer; layer_types says which windows slide, or else the family."""
    fields = Fields(config, path)
    num_layers = fields.count("num_hidden_layers", most=MAX_LAYERS)
    types = config.get("layer_types")
    if types is None:
        types = [SLIDING if family.slides(fields, layer) else FULL for layer in range(num_layers)]
    if not isinstance(types, list) or len(types) != num_layers:
        raise ModelCorrupt(f"{path}: layer_types must have an entry for each of the {num_layers} layers.")
    if unknown := sorted({str(kind) for kind in types} - {SLIDING, FULL}):
        raise UnsupportedModel(f"Layers of type {unknown[0]} are not supported.")
    scalar = fields.optional_positive("query_pre_attn_scalar")
    scale = None if scalar is None else scalar**-0.5
    softcap = fields.optional_positive("attn_logit_softcapping")
    window = fields.optional_count("sliding_window") if SLIDING in types else None
    windows = {FULL: None, SLIDING: None if window is None or window >= max_context else window}
    ropes = rope_by_layer_type(config, max_context, path)
    layers = {kind: LayerConfig(AttentionForm(scale, windows[kind], softcap), ropes[kind]) for kind in (FULL, SLIDING)}
    return tuple(layers[kind] for kind in types)


def _activation(config: Mapping[str, Any], family: Family, architecture: str) -> Activation:
    """The first Gemma says "gelu" under another name and means its approximation, which is the family's default."""
    name = config.get("hidden_activation") or family.defaults.get("hidden_activation") or config.get("hidden_act")
    name = name or "silu"
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise UnsupportedModel(f"{architecture} with activation {name} is not supported.")
    return ACTIVATIONS[name]


def _end_tokens(
    config: Mapping[str, Any], generation: Mapping[str, Any], vocab_size: int, path: Path
) -> tuple[int, ...]:
    name = "eos_token_id"
    source, path = (generation, path.with_name("generation_config.json")) if name in generation else (config, path)
    return end_tokens(source.get(name), vocab_size, str(path))


def end_tokens(value: Any, vocab_size: int, place: str) -> tuple[int, ...]:
    """What an eos_token_id says: null, a token or several. Raises ModelCorrupt, naming the place, for what is none."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token_id in ids:
        if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < vocab_size:
            raise ModelCorrupt(f"{place}: eos_token_id {token_id!r} is not in the vocabulary of {vocab_size} tokens.")
    return tuple(ids)
