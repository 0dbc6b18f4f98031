"""A decoder of any family in families.py: fused projections, attention plugged in, the rest by the device's ops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from services.engine.attention.backend import AttentionBackend
from services.engine.batch import ForwardBatch
from services.engine.largest import largest
from services.engine.model.config import ModelConfig
from services.engine.model.linear.linear import Linear
from services.engine.model.ops import Ops, Step
from services.engine.model.ops_choice import make_ops
from services.engine.model.rope import RotaryTable

if TYPE_CHECKING:
    from services.engine.kernels.team import Team
    from services.engine.model.recorder import Recorder


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

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        team: Team | None = None,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        """`team`: whose layers the linear ones are, see LinearMaker; then steps are recorded for it where that goes.

        `kv_dtype`: what pools keep KV in; None: the dtype that the model computes in.
        """
        self.config = config
        self._weights = weights
        self._ops = make_ops(config, self.device, self.dtype, kv_dtype or self.dtype)
        self._recorder = None if team is None else _recorder(config, team)
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
        """The last layer's hidden states, (num_tokens, hidden), before the final norm; of batch.last those rows only.

        on_layer(l) is called when the KV of layer l is written for every token of the batch and before that layer's
        attention computes, so a transfer of layer l overlaps all that follows. On a GPU "written" means queued on
        the current stream: record an event there.
        """
        step = Step(batch, attention, on_layer)
        recorder = self._recorder if self._recorder is not None and self._recorder.takes(step) else None
        if batch.last is None:
            return self._all_rows(self._ops, step) if recorder is None else recorder.compute_step(self._all_rows, step)
        compute = (lambda work, step: work(self._ops, step)) if recorder is None else recorder.compute_once
        hidden, query = compute(self._up_to_last_layer, step)
        if (rows := batch.last.rows).numel():
            some, its_query = hidden[rows], query[rows]
            only = Step(batch.last.batch, attention)
            hidden[rows] = compute(lambda ops, step: self._finish(ops, step, some, its_query), only)
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits, (rows, vocab) float32, of hidden states, (rows, hidden), that forward returned."""

        logits = self._of_head(lambda ops, rows: ops.linear(self._weights.head, rows), hidden).float()
        softcap = self.config.logits_softcap
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    @torch.inference_mode()
    def largest(self, hidden: Tensor) -> Tensor:
        """See Model."""
        if self.config.logits_softcap is not None:  # after which more of them may be equal
            return largest(self.logits(hidden))
        return self._of_head(lambda ops, rows: ops.largest(self._weights.head, rows), hidden)

    def _of_head(self, compute: Callable[[Ops, Tensor], Tensor], hidden: Tensor) -> Tensor:
        def of_rows(ops: Ops) -> Tensor:
            return compute(ops, ops.norm(hidden.contiguous(), self._weights.norm))

        return of_rows(self._ops) if self._recorder is None else self._recorder.compute(of_rows)

    def _all_rows(self, ops: Ops, step: Step) -> Tensor:
        return self._finish(ops, step, *self._up_to_last_layer(ops, step))

    def _up_to_last_layer(self, ops: Ops, step: Step) -> tuple[Tensor, Tensor]:
        """Hidden states before the last layer's attention, (num_tokens, hidden), and its queries; its KV is written."""
        hidden = ops.embed(step, self._weights.embedding, self.config.embedding_scale)
        query = self._attention_input(ops, step, 0, hidden, None)
        for index in range(1, self.config.num_layers):
            query = self._attention_input(ops, step, index, hidden, self._added(ops, step, index - 1, hidden, query))
        return hidden, query

    def _finish(self, ops: Ops, step: Step, hidden: Tensor, query: Tensor) -> Tensor:
        ops.add(hidden, self._added(ops, step, self.config.num_layers - 1, hidden, query))
        return hidden

    def _attention_input(self, ops: Ops, step: Step, index: int, hidden: Tensor, added: Tensor | None) -> Tensor:
        """A layer's queries, (num_tokens, num_heads, head_dim), and its KV in place."""
        layer, rotary = self._weights.layers[index], self._rotary[self.config.layers[index].rope]
        projected = ops.linear(layer.query_key_value, ops.add_norm(hidden, added, layer.input_norm))
        return ops.rotate_and_store(step, index, projected, layer.query_key_norm, rotary)

    def _added(self, ops: Ops, step: Step, index: int, hidden: Tensor, query: Tensor) -> Tensor:
        """The rest of a layer: what its MLP adds to the hidden states, to which its attention is added here."""
        layer = self._weights.layers[index]
        mixed = ops.attend(step, index, query, self.config.layers[index].attention)  # (num_tokens, heads * head_dim)
        added = _optional_norm(ops, ops.linear(layer.output, mixed), layer.attention_norm)
        gate_up = ops.linear(layer.gate_up, ops.add_norm(hidden, added, layer.mlp_norm))
        return _optional_norm(ops, ops.linear(layer.down, ops.activate(gate_up)), layer.down_norm)


def _recorder(config: ModelConfig, team: Team) -> Recorder:
    # Here, because numba and its machine code take 0.5 s to load and engines on a GPU never need them.
    from services.engine.model.recorder import Recorder

    return Recorder(config, team)


def _optional_norm(ops: Ops, rows: Tensor, weight: Tensor | None) -> Tensor:
    return rows if weight is None else ops.norm(rows, weight)
