"""The Llama family in torch: fused projections, norms and rotary positions in float32, attention plugged in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from services.engine.attention.backend import AttentionBackend
from services.engine.batch import ForwardBatch
from services.engine.model.config import ModelConfig
from services.engine.model.rope import RotaryTable, rotate


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. Matrices are (out, in) and contiguous, as F.linear wants them; biases are mostly absent."""

    input_norm: Tensor  # (hidden,)
    query_key_value: Tensor  # ((num_heads + 2 * num_kv_heads) * head_dim, hidden): queries, keys, values
    query_key_value_bias: Tensor | None
    output: Tensor  # (hidden, num_heads * head_dim)
    output_bias: Tensor | None
    mlp_norm: Tensor  # (hidden,)
    gate_up: Tensor  # (2 * intermediate, hidden): gate, then up
    gate_up_bias: Tensor | None
    down: Tensor  # (hidden, intermediate)
    down_bias: Tensor | None


@dataclass(frozen=True, slots=True)
class LlamaWeights:
    """All weights, on one device and of one dtype."""

    embedding: Tensor  # (vocab, hidden)
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # (hidden,)
    head: Tensor  # (vocab, hidden); the embedding itself when tied


class LlamaModel:
    """Computes packed batches of sequences of any length, prefill and decode alike."""

    def __init__(self, config: ModelConfig, weights: LlamaWeights) -> None:
        self.config = config
        self._weights = weights
        self._rotary = RotaryTable(config.rope, config.head_dim, config.max_context, weights.embedding.device)

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
        weights, config = self._weights, self.config
        hidden = F.embedding(batch.token_ids, weights.embedding)  # (num_tokens, hidden)
        cosine, sine = self._rotary.at(batch.positions)
        num_queries = config.num_heads * config.head_dim
        for index, layer in enumerate(weights.layers):
            normed = self._norm(hidden, layer.input_norm)
            projected = F.linear(normed, layer.query_key_value, layer.query_key_value_bias)
            heads = projected.view(batch.num_tokens, -1, config.head_dim)  # queries, keys, values
            rotated = rotate(heads[:, : config.num_heads + config.num_kv_heads], cosine, sine)
            key, value = rotated[:, config.num_heads :], heads[:, config.num_heads + config.num_kv_heads :]
            attention.write(index, key, value, batch.slots)
            if on_layer is not None:
                on_layer(index)
            mixed = attention.attend(index, rotated[:, : config.num_heads], batch)  # (num_tokens, num_heads, head_dim)
            hidden = hidden + F.linear(mixed.reshape(-1, num_queries), layer.output, layer.output_bias)
            normed = self._norm(hidden, layer.mlp_norm)
            gate, up = F.linear(normed, layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)
            hidden = hidden + F.linear(F.silu(gate).mul_(up), layer.down, layer.down_bias)
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits, (rows, vocab) float32, of hidden states, (rows, hidden), that forward returned."""
        return F.linear(self._norm(hidden, self._weights.norm), self._weights.head).float()

    def _norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm whose mean square is taken in float32 whatever the dtype."""
        scale = hidden.float().square().mean(-1, keepdim=True).add_(self.config.norm_eps).rsqrt_()
        return (hidden.float() * scale).to(hidden.dtype) * weight
