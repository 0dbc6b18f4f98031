"""config.json and generation_config.json of a GGUF file."""

from __future__ import annotations

from typing import Any

import torch

from services.engine.model.errors import UnsupportedModel
from services.engine.model.gguf.architectures import GgufArchitecture, architecture_of
from services.engine.model.gguf.reader import GgufFile
from services.engine.model.rope import frequencies, plain_frequencies
from services.engine.model.rope_config import RopeConfig

ROPE_DIVISORS = "rope_freqs.weight"
OUTPUT_HEAD = "output.weight"
# llama.cpp writes Llama 3.1's stretched frequencies as numbers; all releases came from these parameters.
LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_ORIGINAL = 1.0, 4.0, 8192
# Tokens of a GGUF file that end a turn: end of sequence, of turn, of message.
END_TOKEN_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


def transformers_config(file: GgufFile) -> dict[str, Any]:
    """The content of config.json. Raises UnsupportedModel naming what this engine does not compute."""
    architecture = architecture_of(file)
    if file.count(file.own("expert_count"), 0) > 0:
        raise UnsupportedModel(f"{file.path.name} is a mixture of experts, which is not supported.")
    heads, hidden = file.count(file.own("attention.head_count")), file.count(file.own("embedding_length"))
    head_dim = file.count(file.own("attention.key_length"), hidden // max(1, heads))
    if file.count(file.own("rope.dimension_count"), head_dim) != head_dim:
        raise UnsupportedModel(f"{file.path.name} rotates a part of each head only, which is not supported.")
    if file.count(file.own("attention.value_length"), head_dim) != head_dim:
        raise UnsupportedModel(f"{file.path.name} has values and keys of different size, which is not supported.")
    config = {
        "architectures": [architecture.transformers_name],
        "model_type": architecture.model_type,
        "vocab_size": len(file.texts("tokenizer.ggml.tokens")),
        "hidden_size": hidden,
        "intermediate_size": file.count(file.own("feed_forward_length")),
        "num_hidden_layers": file.count(file.own("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": file.count(file.own("attention.head_count_kv"), heads),
        "head_dim": head_dim,
        "max_position_embeddings": file.count(file.own("context_length")),
        "rms_norm_eps": file.number(file.own("attention.layer_norm_rms_epsilon")),
        "rope_theta": file.number(file.own("rope.freq_base"), 10000.0),
        "rope_scaling": _rope_scaling(file, head_dim),
        "tie_word_embeddings": OUTPUT_HEAD not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "bos_token_id": file.optional_count("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.optional_count("tokenizer.ggml.eos_token_id"),
        "torch_dtype": _dtype(file),
    }
    return config | (_gemma(file, architecture, hidden, heads, head_dim) if architecture.norm_offset else _window(file))


def _window(file: GgufFile) -> dict[str, Any]:
    """The activation, and for a Llama whose window slides its name in transformers: Mistral."""
    window = file.optional_count(file.own("attention.sliding_window"))
    name = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    is_mistral = window is not None and file.architecture == "llama"
    return {"hidden_act": "silu", "sliding_window": window, **(name if is_mistral else {})}


def _gemma(file: GgufFile, architecture: GgufArchitecture, hidden: int, heads: int, head_dim: int) -> dict[str, Any]:
    """What Gemma has beyond Llama. The scale is not in the file: llama.cpp too tells it from the number of layers."""
    gemma: dict[str, Any] = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
    if architecture.window_period is None:
        return gemma
    is_large = file.count(file.own("block_count")) == architecture.large_scale_layers
    return gemma | {
        "query_pre_attn_scalar": hidden // max(1, heads) if is_large else head_dim,
        "sliding_window": file.count(file.own("attention.sliding_window")),
        "sliding_window_pattern": architecture.window_period,
        "rope_local_base_freq": file.number(file.own("rope.freq_base_swa"), 10000.0)
        if file.architecture == "gemma3"
        else None,
        "attn_logit_softcapping": file.optional_number(file.own("attn_logit_softcapping")),
        "final_logit_softcapping": file.optional_number(file.own("final_logit_softcapping")),
    }


def generation_config(file: GgufFile) -> dict[str, Any]:
    """The content of generation_config.json: all tokens that end a turn."""
    ends = [file.optional_count(f"tokenizer.ggml.{key}") for key in END_TOKEN_KEYS]
    return {
        "bos_token_id": file.optional_count("tokenizer.ggml.bos_token_id"),
        "eos_token_id": sorted({end for end in ends if end is not None}),
    }


def _rope_scaling(file: GgufFile, head_dim: int) -> dict[str, Any] | None:
    if ROPE_DIVISORS in file.tensors:
        return _llama3_scaling(file, head_dim)
    kind = file.optional_text(file.own("rope.scaling.type")) or "none"
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": file.number(file.own("rope.scaling.factor"))}
    raise UnsupportedModel(f"Rotary position scaling of type {kind} in {file.path.name} is not supported.")


def _llama3_scaling(file: GgufFile, head_dim: int) -> dict[str, Any]:
    """The parameters from which the stored divisors follow."""
    stored = torch.tensor(file.tensors[ROPE_DIVISORS].dequantized()).flatten()
    theta, factor = file.number(file.own("rope.freq_base"), 10000.0), float(stored.max())
    rope = RopeConfig(theta, "llama3", factor, LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_ORIGINAL)
    derived = plain_frequencies(rope, head_dim) / frequencies(rope, head_dim)
    if derived.shape != stored.shape or not torch.allclose(derived, stored, rtol=1e-4):
        raise UnsupportedModel(f"The rotary frequencies stored in {file.path.name} are not Llama 3's.")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LLAMA3_LOW,
        "high_freq_factor": LLAMA3_HIGH,
        "original_max_position_embeddings": LLAMA3_ORIGINAL,
    }


def _dtype(file: GgufFile) -> str:
    """The least dtype that holds every stored value: one 16-bit format, or float32 beside quantised tensors."""
    matrices = {tensor.quantization for tensor in file.tensors.values() if len(tensor.shape) > 1}
    only = matrices.pop() if len(matrices) == 1 else ""
    return {"F16": "float16", "BF16": "bfloat16"}.get(only, "float32")
