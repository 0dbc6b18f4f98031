"""What GGUF's architectures are called in transformers, and how llama.cpp's converter changed their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from services.engine.model.errors import UnsupportedModel
from services.engine.model.gguf.reader import GgufFile

_LLAMA_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEAD_NORM_NAMES = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_POST_NORM_NAMES = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclass(frozen=True, slots=True)
class GgufArchitecture:
    """One value of general.architecture."""

    transformers_name: str
    model_type: str
    layer_names: Mapping[str, str]  # of a layer's tensors
    is_permuted: bool = False  # rows of queries and keys stand in another order within each head
    norm_offset: float = 0.0  # was added to the weights of all norms
    window_period: int | None = None  # every so many layers, one sees everything
    large_scale_layers: int | None = None  # so many layers mean that scores scale by hidden size per head


ARCHITECTURES = {
    "llama": GgufArchitecture("LlamaForCausalLM", "llama", _LLAMA_NAMES, is_permuted=True),
    "qwen2": GgufArchitecture("Qwen2ForCausalLM", "qwen2", _LLAMA_NAMES),
    "qwen3": GgufArchitecture("Qwen3ForCausalLM", "qwen3", _LLAMA_NAMES | _HEAD_NORM_NAMES),
    "gemma": GgufArchitecture("GemmaForCausalLM", "gemma", _LLAMA_NAMES, norm_offset=1.0),
    "gemma2": GgufArchitecture(
        "Gemma2ForCausalLM",
        "gemma2",
        _LLAMA_NAMES | _POST_NORM_NAMES,
        norm_offset=1.0,
        window_period=2,
        large_scale_layers=46,
    ),
    "gemma3": GgufArchitecture(
        "Gemma3ForCausalLM",
        "gemma3_text",
        _LLAMA_NAMES | _POST_NORM_NAMES | _HEAD_NORM_NAMES,
        norm_offset=1.0,
        window_period=6,
        large_scale_layers=62,
    ),
}


def architecture_of(file: GgufFile) -> GgufArchitecture:
    """Raises UnsupportedModel naming an architecture that is not known."""
    if file.architecture not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UnsupportedModel(
            f"The architecture {file.architecture} of {file.path.name} is not supported in GGUF; {known} are."
        )
    return ARCHITECTURES[file.architecture]
