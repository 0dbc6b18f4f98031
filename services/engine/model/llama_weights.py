"""Llama-family weights from a checkpoint in the naming of transformers, fused as the model computes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.engine.model.checkpoint import Checkpoint
from services.engine.model.config import ModelConfig
from services.engine.model.llama import LayerWeights, LlamaWeights

# Frequencies that old checkpoints stored although they follow from the configuration, and a head that is tied.
UNUSED_SUFFIXES = ("rotary_emb.inv_freq",)
HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads tensors of known shape into new memory of one dtype and device."""

    checkpoint: Checkpoint
    dtype: torch.dtype
    device: torch.device

    def tensor(self, name: str, *shape: int) -> Tensor:
        target = torch.empty(shape, dtype=self.dtype, device=self.device)
        self.checkpoint.read_into(name, target)
        return target

    def stacked(self, prefix: str, parts: Sequence[tuple[str, int]], suffix: str, *columns: int) -> Tensor:
        """Several (rows, *columns) tensors one under the other."""
        target = torch.empty((sum(rows for _, rows in parts), *columns), dtype=self.dtype, device=self.device)
        start = 0
        for name, rows in parts:
            self.checkpoint.read_into(f"{prefix}{name}.{suffix}", target[start : start + rows])
            start += rows
        return target


def read_llama_weights(
    checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> LlamaWeights:
    """All weights of `config`. Raises ModelCorrupt for a missing, superfluous or misshapen tensor."""
    reader = _Reader(checkpoint, dtype, device)
    embedding = reader.tensor("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
    layers = tuple(_read_layer(reader, config, f"model.layers.{index}.") for index in range(config.num_layers))
    norm = reader.tensor("model.norm.weight", config.hidden_size)
    tied = config.tie_word_embeddings
    head = embedding if tied else reader.tensor(HEAD, config.vocab_size, config.hidden_size)
    checkpoint.require_all_read((*UNUSED_SUFFIXES, HEAD) if tied else UNUSED_SUFFIXES)
    return LlamaWeights(embedding, layers, norm, head)


def _read_layer(reader: _Reader, config: ModelConfig, prefix: str) -> LayerWeights:
    hidden, intermediate = config.hidden_size, config.intermediate_size
    num_queries, num_keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    projections = [("q_proj", num_queries), ("k_proj", num_keys), ("v_proj", num_keys)]
    gates = [("gate_proj", intermediate), ("up_proj", intermediate)]
    attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
    return LayerWeights(
        input_norm=reader.tensor(f"{prefix}input_layernorm.weight", hidden),
        query_key_value=reader.stacked(attention, projections, "weight", hidden),
        query_key_value_bias=reader.stacked(attention, projections, "bias") if config.attention_bias else None,
        output=reader.tensor(f"{attention}o_proj.weight", hidden, num_queries),
        output_bias=reader.tensor(f"{attention}o_proj.bias", hidden) if config.attention_bias else None,
        mlp_norm=reader.tensor(f"{prefix}post_attention_layernorm.weight", hidden),
        gate_up=reader.stacked(mlp, gates, "weight", hidden),
        gate_up_bias=reader.stacked(mlp, gates, "bias") if config.mlp_bias else None,
        down=reader.tensor(f"{mlp}down_proj.weight", hidden, intermediate),
        down_bias=reader.tensor(f"{mlp}down_proj.bias", hidden) if config.mlp_bias else None,
    )
