"""A random model that computes next to nothing, so that what is around the computing shows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

_LAYERS, _HIDDEN, _HEADS, _VOCABULARY = 1, 32, 2, 256


def write_tiny_model(folder: Path) -> Path:
    """A Llama of one layer with a tokenizer of single letters. Needs the engine's packages."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": _VOCABULARY,
        "hidden_size": _HIDDEN,
        "intermediate_size": 2 * _HIDDEN,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _HEADS,
        "hidden_act": "silu",
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    vocabulary = {chr(0x4E00 + index): index for index in range(_VOCABULARY)}
    tokenizer = {"version": "1.0", "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": chr(0x4E00)}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    random = np.random.default_rng(0)
    shapes = {"embed_tokens": (_VOCABULARY, _HIDDEN)}
    for layer in range(_LAYERS):
        for name in ("q", "k", "v", "o"):
            shapes[f"layers.{layer}.self_attn.{name}_proj"] = (_HIDDEN, _HIDDEN)
        for name in ("gate", "up"):
            shapes[f"layers.{layer}.mlp.{name}_proj"] = (2 * _HIDDEN, _HIDDEN)
        shapes[f"layers.{layer}.mlp.down_proj"] = (_HIDDEN, 2 * _HIDDEN)
    weights = {f"model.{name}.weight": random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    norms = [f"layers.{layer}.{name}_layernorm" for layer in range(_LAYERS) for name in ("input", "post_attention")]
    weights |= {f"model.{name}.weight": np.ones(_HIDDEN, np.float32) for name in (*norms, "norm")}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
