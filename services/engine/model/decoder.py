"""A decoder in torch, of any family in families.py: fused projections, norms in float32, attention plugged in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from services.engine.attention.backend import AttentionBackend
from services.engine.batch import ForwardBatch
from services.engine.model.config import Activation, ModelConfig
from services.engine.model.linear.linear import Linear
from services.engine.model.rope import RotaryTable, rotate

ACTIVATE: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda values: F.gelu(values, approximate="tanh"),
}


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. Norms are float32 and include the family's offset; None where the family has none."""

    input_norm: Tensor  # (hidden,)
    query_key_value: Linear  # hidden to (num_heads + 2 * num_kv_heads) * head_dim: queries, keys, values
    query_key_norm: Tensor | None  # (num_heads + num_kv_heads, head_dim)
    output: Linear  # num_heads * head_dim to hidden
    attention_norm: Tensor | None  # (hidden,), of what attention adds
    mlp_norm: Tensor  # (hidden,)
    gate_up: Linear  # hidden to 2 * intermediate: gate, then up
    down: Linear  # intermediate to hidden
    down_norm: Tensor | None  # (hidden,), of what the MLP adds


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All weights, on one device; the embedding is of the dtype that the model computes in."""

    embedding: Tensor  # (vocab, hidden)
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # (hidden,) float32
    head: Linear  # hidden to vocab


class Decoder:
    """Computes packed batches of sequences of any length, prefill and decode alike."""

    def __init__(self, config: ModelConfig, weights: DecoderWeights) -> None:
        self.config = config
        self._weights = weights
        self._activate = ACTIVATE[config.activation]
        ropes = {layer.rope for layer in config.layers}
        self._rotary = {rope: RotaryTable(rope, config.head_dim, config.max_context, self.device) for rope in ropes}

    @property
    def device(self) -> torch.device:
        return self._weights.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self._weights.embedding.dtype

    @torch.inference_mode()
    def forward(
        self,
        batch: ForwardBatch,
        attention: AttentionBackend,
        on_layer: Callable[[int], None] | None = None,
    ) -> Tensor:
        """The last layer's hidden states, (num_tokens, hidden), before the final norm.

        on_layer(l) is called when the KV of layer l is written for every token of the batch and before that layer's
        attention computes, so a transfer of layer l overlaps all that follows. On a GPU "written" means queued on
        the current stream: record an event there.
        """
        hidden = F.embedding(batch.token_ids, self._weights.embedding)  # (num_tokens, hidden)
        if self.config.embedding_scale != 1:
            hidden = hidden * torch.tensor(self.config.embedding_scale, dtype=hidden.dtype, device=hidden.device)
        angles = {rope: table.at(batch.positions) for rope, table in self._rotary.items()}
        for index, (layer, facts) in enumerate(zip(self._weights.layers, self.config.layers, strict=True)):
            query, key, value = self._project(layer, hidden, *angles[facts.rope])
            attention.write(index, key, value, batch.slots)
            if on_layer is not None:
                on_layer(index)
            mixed = attention.attend(index, query, batch, facts.attention)  # (num_tokens, num_heads, head_dim)
            hidden = hidden + self._optional_norm(layer.output(mixed.flatten(1)), layer.attention_norm)
            gate, up = layer.gate_up(self._norm(hidden, layer.mlp_norm)).chunk(2, dim=-1)
            hidden = hidden + self._optional_norm(layer.down(self._activate(gate).mul_(up)), layer.down_norm)
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits, (rows, vocab) float32, of hidden states, (rows, hidden), that forward returned."""
        logits = self._weights.head(self._norm(hidden, self._weights.norm)).float()
        softcap = self.config.logits_softcap
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    def _project(self, layer: LayerWeights, hidden: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, (num_tokens, heads, head_dim) each; queries and keys are rotated."""
        config = self.config
        projected = layer.query_key_value(self._norm(hidden, layer.input_norm))
        heads = projected.view(hidden.shape[0], -1, config.head_dim)  # queries, keys, values
        num_rotated = config.num_heads + config.num_kv_heads
        rotated = rotate(self._optional_norm(heads[:, :num_rotated], layer.query_key_norm), cosine, sine)
        return rotated[:, : config.num_heads], rotated[:, config.num_heads :], heads[:, num_rotated:]

    def _optional_norm(self, values: Tensor, weight: Tensor | None) -> Tensor:
        return values if weight is None else self._norm(values, weight)

    def _norm(self, values: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm over the last dimension, in float32 whatever the dtype."""
        exact = values.float()
        scale = exact.square().mean(-1, keepdim=True).add_(self.config.norm_eps).rsqrt_()
        return (exact * scale).mul_(weight).to(values.dtype)
