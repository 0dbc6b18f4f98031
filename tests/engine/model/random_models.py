"""Small random models of every native family, made by transformers, that its own code can compute too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

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


def save_random(folder: Path, config_class: str, changes: dict[str, Any], *, attention: str = "eager") -> Any:
    """A random model of transformers, written to `folder` and returned; `attention` as transformers calls it."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**{**SHAPE, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:  # initialised to constants, which would hide mistakes
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    model.eval().save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return model
