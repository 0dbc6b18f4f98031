"""Tiny Llama checkpoints for tests: a transformers-compatible folder written without transformers or torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)  # ids 0, 1, 2
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SCORE_SPREAD = 1.5  # about the standard deviation of attention scores: peaked enough that wrong KV changes the tokens


def make_tiny_llama(
    folder: Path,
    *,
    layers: int = 4,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 512,
    max_context: int = 4096,
    seed: int = 0,
    scale: float = 10.0,
) -> Path:
    """Writes a random float32 Llama with a byte-level BPE tokenizer into `folder` and returns it.

    The same arguments give the same bytes. `scale` is about the standard deviation of a logit, so the gap between the
    two largest is about 0.3 * scale: greedy tokens survive float32 rounding. The rows of the special tokens in the
    head are zero, so greedy decoding never ends by itself: bias a logit to reach an end token.
    """
    folder.mkdir(parents=True, exist_ok=True)
    head_dim, intermediate = hidden // heads, hidden * 2
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": max_context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": TURN_START,
        "eos_token": TURN_END,
        "unk_token": END_OF_TEXT,
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": max_context,
    }
    weights = _weights(np.random.default_rng(seed), layers, hidden, intermediate, heads, kv_heads, vocab, scale)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", config)
    _write_json(folder / "tokenizer_config.json", tokenizer_config)
    _write_json(folder / "tokenizer.json", _byte_level_bpe(vocab))
    return folder


def _weights(
    random: np.random.Generator,
    layers: int,
    hidden: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    scale: float,
) -> dict[str, NDArray[np.float32]]:
    def matrix(rows: int, columns: int, gain: float) -> NDArray[np.float32]:
        values = random.standard_normal((rows, columns), dtype=np.float32)
        return values * np.float32(gain / np.sqrt(columns))

    head_dim = hidden // heads
    query_gain = np.sqrt(SCORE_SPREAD)
    weights = {"model.embed_tokens.weight": random.standard_normal((vocab, hidden), dtype=np.float32)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{norm}.weight"] = 1 + 0.1 * random.standard_normal(hidden, dtype=np.float32)
        weights[f"{prefix}self_attn.q_proj.weight"] = matrix(heads * head_dim, hidden, query_gain)
        weights[f"{prefix}self_attn.k_proj.weight"] = matrix(kv_heads * head_dim, hidden, query_gain)
        weights[f"{prefix}self_attn.v_proj.weight"] = matrix(kv_heads * head_dim, hidden, 2.0)
        weights[f"{prefix}self_attn.o_proj.weight"] = matrix(hidden, heads * head_dim, 1.0)
        weights[f"{prefix}mlp.gate_proj.weight"] = matrix(intermediate, hidden, 1.0)
        weights[f"{prefix}mlp.up_proj.weight"] = matrix(intermediate, hidden, 1.0)
        weights[f"{prefix}mlp.down_proj.weight"] = matrix(hidden, intermediate, 1.0)
    weights["model.norm.weight"] = np.ones(hidden, dtype=np.float32)
    head = matrix(vocab, hidden, scale)
    head[: len(SPECIAL_TOKENS)] = 0
    weights["lm_head.weight"] = head
    return weights


def _byte_level_bpe(vocab: int) -> dict[str, object]:
    """A tokenizer.json whose vocabulary is the special tokens, the 256 bytes, then pairs of letters."""
    alphabet = byte_characters()
    pieces = [*SPECIAL_TOKENS, *alphabet]
    if vocab < len(pieces):
        raise ValueError(f"vocab must be at least {len(pieces)} to hold every byte, not {vocab}")
    merges: list[list[str]] = []
    space, letters = alphabet[ord(" ")], "etaoinshrdlucmfwygpbvkxqjz"
    pairs = [(space, letter) for letter in letters] + [(a, b) for a in letters for b in letters]
    for left, right in pairs[: vocab - len(pieces)]:
        pieces.append(left + right)
        merges.append([left, right])
    pieces += [f"<|unused_{index}|>" for index in range(vocab - len(pieces))]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": index,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for index, token in enumerate(SPECIAL_TOKENS)
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {piece: index for index, piece in enumerate(pieces)},
            "merges": merges,
        },
    }


def byte_characters() -> list[str]:
    """The printable character that byte-level BPE uses for each of the 256 bytes (GPT-2's table)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    characters, replacement = [], 256
    for byte in range(256):
        if byte in printable:
            characters.append(chr(byte))
        else:
            characters.append(chr(replacement))
            replacement += 1
    return characters


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
