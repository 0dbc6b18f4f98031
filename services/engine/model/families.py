"""The families of decoders that model/decoder.py computes, and what their config.json files leave unsaid.

All of them are a Llama (Touvron et al., arXiv 2302.13971 and 2307.09288) with other choices in a few places. What a
choice is called in the configuration is read there (config.py); what only the architecture's name tells is here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from services.engine.model.json_fields import Fields

SLIDING, FULL = "sliding_attention", "full_attention"  # values of layer_types


def _no_layer(config: Fields, layer: int) -> bool:
    return False


def _every_layer(config: Fields, layer: int) -> bool:
    return True


def _late_layers(config: Fields, layer: int) -> bool:
    return bool(config.values.get("use_sliding_window")) and layer >= config.count("max_window_layers", 28, least=0)


def _all_but_every_nth(config: Fields, layer: int) -> bool:
    return (layer + 1) % config.count("sliding_window_pattern") != 0


@dataclass(frozen=True, slots=True)
class Family:
    """What the name of an architecture says."""

    query_key_value_bias: bool | None = None  # None: attention_bias of the configuration, for the output too
    query_key_norm: bool = False  # each head of queries and keys is normed before it is rotated
    post_norms: bool = False  # what attention and MLP give is normed before it is added
    norm_offset: float = 0.0  # added to every norm's weight
    scales_embedding: bool = False  # embeddings are multiplied by sqrt(hidden_size)
    slides: Callable[[Fields, int], bool] = _no_layer  # whether a layer's window slides, without layer_types
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of keys that configurations leave out
    text_config: bool = False  # the language model is a part of the configuration; other parts are not served


_GEMMA: dict[str, Any] = {
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "head_dim": 256,
    "vocab_size": 256000,
    "max_position_embeddings": 8192,
}
_GEMMA2 = _GEMMA | {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 2,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
_GEMMA3 = _GEMMA2 | {
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "sliding_window_pattern": 6,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
}

_QWEN2 = Family(query_key_value_bias=True, slides=_late_layers)
_GEMMA3_FAMILY = Family(
    query_key_norm=True,
    post_norms=True,
    norm_offset=1.0,
    scales_embedding=True,
    slides=_all_but_every_nth,
    defaults=_GEMMA3,
)

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(slides=_every_layer),
    "Qwen2ForCausalLM": _QWEN2,
    "Qwen3ForCausalLM": Family(query_key_norm=True, slides=_late_layers, defaults={"head_dim": 128}),
    "GemmaForCausalLM": Family(norm_offset=1.0, scales_embedding=True, defaults=_GEMMA),
    "Gemma2ForCausalLM": Family(
        post_norms=True, norm_offset=1.0, scales_embedding=True, slides=_all_but_every_nth, defaults=_GEMMA2
    ),
    "Gemma3ForCausalLM": _GEMMA3_FAMILY,
    "Gemma3ForConditionalGeneration": dataclasses.replace(_GEMMA3_FAMILY, text_config=True),
}
