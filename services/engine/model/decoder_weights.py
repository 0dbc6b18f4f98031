"""A decoder's weights from a checkpoint in the naming of transformers, fused as the model computes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.engine.model.checkpoint import Checkpoint
from services.engine.model.config import ModelConfig
from services.engine.model.decoder import DecoderWeights, LayerWeights
from services.engine.model.linear.blocks import BLOCK, stacked
from services.engine.model.linear.linear import DENSE, Linear, LinearMaker
from services.engine.model.shard import WHOLE, Shard

# Frequencies that old checkpoints stored although they follow from the configuration.
UNUSED_SUFFIXES = ("rotary_emb.inv_freq",)
# Where the language model is, and its head: alone, or in a model of several parts as once and as now written.
PLACES = (
    ("model.", "lm_head.weight"),
    ("language_model.model.", "language_model.lm_head.weight"),
    ("model.language_model.", "lm_head.weight"),
)
EMBEDDING = "embed_tokens.weight"
# Parts that read images; only text is served.
OTHER_PARTS = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads tensors of known shape into new memory of one dtype and device, and makes linear layers of this rank's
    part of them. Sizes are those of the whole model."""

    checkpoint: Checkpoint
    dtype: torch.dtype
    device: torch.device
    maker: LinearMaker
    norm_offset: float
    shard: Shard

    def tensor(self, name: str, *shape: int) -> Tensor:
        self.checkpoint.require(name, shape)
        target = torch.empty(shape, dtype=self.dtype, device=self.device)
        self.checkpoint.read_into(name, target, shape)
        return target

    def norm(self, name: str, size: int) -> Tensor:
        self.checkpoint.require(f"{name}.weight", (size,))
        target = torch.empty(size, dtype=torch.float32, device=self.device)
        self.checkpoint.read_into(f"{name}.weight", target, (size,))
        return target.add_(self.norm_offset)

    def stacked(self, prefix: str, parts: Sequence[tuple[str, int]], suffix: str, *columns: int) -> Tensor:
        """This rank's rows of several (rows, *columns) tensors, one under the other."""
        for name, rows in parts:
            self.checkpoint.require(f"{prefix}{name}.{suffix}", (rows, *columns))
        own = [(name, rows, self.shard.part(rows)) for name, rows in parts]
        num_rows = sum(part.stop - part.start for _, _, part in own)
        target = torch.empty((num_rows, *columns), dtype=self.dtype, device=self.device)
        start = 0
        for name, rows, part in own:
            end = start + part.stop - part.start
            self.checkpoint.read_into(f"{prefix}{name}.{suffix}", target[start:end], (rows, *columns), (part,))
            start = end
        return target

    def linear(self, prefix: str, parts: Sequence[tuple[str, int]], columns: int, has_bias: bool) -> Linear:
        """One layer that does the work of several of the checkpoint on the same input, one under the other."""
        bias = self.stacked(prefix, parts, "bias") if has_bias else None
        names = [f"{prefix}{name}.weight" for name, _ in parts]
        if self.maker.make_packed is not None and self.checkpoint.is_packed(names):
            blocks = [
                self.checkpoint.read_packed(name, (rows, columns)).part(self.shard.part(rows))
                for name, (_, rows) in zip(names, parts, strict=True)
            ]
            return self.maker.make_packed(stacked(blocks), bias)
        return self.maker.make(self.stacked(prefix, parts, "weight", columns), bias)

    def summed(self, name: str, rows: int, columns: int, has_bias: bool) -> Linear:
        """A layer whose input is spread over the ranks. A bias belongs to the sum, not to each part of it."""
        bias = self.tensor(f"{name}.bias", rows) if has_bias else None
        own_bias = bias if self.shard.count == 1 else None
        return self.shard.summed(self._cut(f"{name}.weight", rows, columns, own_bias), bias)

    def _cut(self, name: str, rows: int, columns: int, bias: Tensor | None) -> Linear:
        part = self.shard.part(columns)
        has_whole_blocks = part.start % BLOCK == part.stop % BLOCK == 0
        if self.maker.make_packed is not None and has_whole_blocks and self.checkpoint.is_packed([name]):
            return self.maker.make_packed(self.checkpoint.read_packed(name, (rows, columns)).inputs(part), bias)
        self.checkpoint.require(name, (rows, columns))
        weight = torch.empty((rows, part.stop - part.start), dtype=self.dtype, device=self.device)
        self.checkpoint.read_into(name, weight, (rows, columns), (slice(None), part))
        return self.maker.make(weight, bias)

    def tied_head(self, name: str, embedding: Tensor) -> Linear:
        """A head whose weight is that of the embedding."""
        part = self.shard.part(embedding.shape[0])
        if self.maker.make_packed is not None and self.checkpoint.is_packed([name]):
            rows, columns = embedding.shape
            return self.maker.make_packed(self.checkpoint.read_packed(name, (rows, columns)).part(part), None)
        return self.maker.make(embedding[part], None)


def read_decoder_weights(
    checkpoint: Checkpoint,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    linear: LinearMaker = DENSE,
    shard: Shard = WHOLE,
) -> DecoderWeights:
    """The weights of `config`, the whole model's, that `shard` has.

    Raises ModelCorrupt for a missing, superfluous or misshapen tensor.
    """
    reader = _Reader(checkpoint, dtype, device, linear, config.norm_offset, shard)
    prefix, head_name = next((place for place in PLACES if place[0] + EMBEDDING in checkpoint), PLACES[0])
    embedding = reader.tensor(prefix + EMBEDDING, config.vocab_size, config.hidden_size)
    layers = tuple(_read_layer(reader, config, f"{prefix}layers.{index}.") for index in range(config.num_layers))
    norm = reader.norm(f"{prefix}norm", config.hidden_size)
    tied = config.tie_word_embeddings
    if tied:
        head = reader.tied_head(prefix + EMBEDDING, embedding)
    else:
        head = reader.linear("", [(head_name.removesuffix(".weight"), config.vocab_size)], config.hidden_size, False)
    checkpoint.require_all_read(
        prefixes=() if prefix == PLACES[0][0] else OTHER_PARTS,
        suffixes=(*UNUSED_SUFFIXES, head_name) if tied else UNUSED_SUFFIXES,  # a stored head is a copy then
    )
    return DecoderWeights(embedding, layers, norm, shard.collected(head))


def _read_layer(reader: _Reader, config: ModelConfig, prefix: str) -> LayerWeights:
    hidden, intermediate = config.hidden_size, config.intermediate_size
    num_queries, num_keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    projections = [("q_proj", num_queries), ("k_proj", num_keys), ("v_proj", num_keys)]
    gates = [("gate_proj", intermediate), ("up_proj", intermediate)]
    attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
    # Llama calls the norm before the MLP by its place after the attention; with norms there too, the names shift.
    mlp_norm = "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"
    return LayerWeights(
        input_norm=reader.norm(f"{prefix}input_layernorm", hidden),
        query_key_value=reader.linear(attention, projections, hidden, config.query_key_value_bias),
        query_key_norm=_query_key_norm(reader, config, attention) if config.query_key_norm else None,
        output=reader.summed(f"{attention}o_proj", hidden, num_queries, config.attention_output_bias),
        attention_norm=reader.norm(f"{prefix}post_attention_layernorm", hidden) if config.post_norms else None,
        mlp_norm=reader.norm(f"{prefix}{mlp_norm}", hidden),
        gate_up=reader.linear(mlp, gates, hidden, config.mlp_bias),
        down=reader.summed(f"{mlp}down_proj", hidden, intermediate, config.mlp_bias),
        down_norm=reader.norm(f"{prefix}post_feedforward_layernorm", hidden) if config.post_norms else None,
    )


def _query_key_norm(reader: _Reader, config: ModelConfig, prefix: str) -> Tensor:
    """The weight of every head: all query heads share one, all key heads another."""
    query, key = (reader.norm(f"{prefix}{name}", config.head_dim) for name in ("q_norm", "k_norm"))
    own = reader.shard.of(config)
    return torch.cat((query.expand(own.num_heads, -1), key.expand(own.num_kv_heads, -1)))
