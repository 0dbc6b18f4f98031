"""What a decoder computes between its linear layers, behind one seam: each kind of device has its own, fused.

TorchOps is the plain form, on any device and in any dtype, and what the others are held equal to. A row of a result
depends on the same row of the arguments alone, so a sequence's numbers are the same whatever shares its batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from services.engine.attention.backend import AttentionBackend
from services.engine.attention.form import AttentionForm
from services.engine.batch import ForwardBatch
from services.engine.largest import largest
from services.engine.model.config import Activation, ModelConfig
from services.engine.model.linear.linear import Linear
from services.engine.model.rope import RotaryTable, rotate

ACTIVATE: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda values: F.gelu(values, approximate="tanh"),
}


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass: its rows, where their KV is, and who hears of layers whose KV is written."""

    batch: ForwardBatch
    attention: AttentionBackend
    on_layer: Callable[[int], None] | None = None


class Ops(Protocol):
    """The operations of one decoder on one device. Norms are RMSNorms in float32, whatever the dtype of their rows.

    What an operation returns is the caller's until the next but one layer.
    """

    def embed(self, step: Step, embedding: Tensor, scale: float) -> Tensor:
        """Rows of embedding (vocab, hidden) for the step's tokens, times scale: (num_tokens, hidden), to be changed."""

    def norm(self, rows: Tensor, weight: Tensor) -> Tensor:
        """The norm of rows (num_rows, hidden)."""

    def add_norm(self, hidden: Tensor, added: Tensor | None, weight: Tensor) -> Tensor:
        """hidden += added, in place, both (num_rows, hidden); then the norm of hidden."""

    def add(self, hidden: Tensor, added: Tensor) -> None:
        """hidden += added, in place."""

    def linear(self, layer: Linear, rows: Tensor) -> Tensor:
        """A linear layer's result, (num_rows, out)."""

    def largest(self, layer: Linear, rows: Tensor) -> Tensor:
        """The column of the largest result of a linear layer without a bias, (num_rows,) int64; see largest.py."""

    def rotate_and_store(
        self, step: Step, layer: int, projected: Tensor, query_key_norm: Tensor | None, table: RotaryTable
    ) -> Tensor:
        """Queries, (num_tokens, num_heads, head_dim), of projected (num_tokens, all heads * head_dim).

        Queries and keys are normed, if there is a norm (num_heads + num_kv_heads, head_dim), and rotated; keys and
        values go into the pages of the layer, and then the step's on_layer(layer) is called.
        """

    def attend(self, step: Step, layer: int, query: Tensor, form: AttentionForm) -> Tensor:
        """Attention over the pages: (num_tokens, num_heads * head_dim)."""

    def activate(self, gate_up: Tensor) -> Tensor:
        """activation(gate) * up of gate_up (num_rows, 2 * intermediate): (num_rows, intermediate)."""


class TorchOps:
    """In plain torch, on any device. See Ops."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._activate = ACTIVATE[config.activation]

    def embed(self, step: Step, embedding: Tensor, scale: float) -> Tensor:
        """See Ops."""
        hidden = F.embedding(step.batch.token_ids, embedding)
        # Rounded as transformers does, but here: a tensor made of it on a GPU waits for all that is queued there.
        return hidden if scale == 1 else hidden * float(torch.tensor(scale, dtype=hidden.dtype))

    def norm(self, rows: Tensor, weight: Tensor) -> Tensor:
        """See Ops."""
        exact = rows.float()
        scale = exact.square().mean(-1, keepdim=True).add_(self._config.norm_eps).rsqrt_()
        return (exact * scale).mul_(weight).to(rows.dtype)

    def add_norm(self, hidden: Tensor, added: Tensor | None, weight: Tensor) -> Tensor:
        """See Ops."""
        if added is not None:
            hidden.add_(added)
        return self.norm(hidden, weight)

    def add(self, hidden: Tensor, added: Tensor) -> None:
        """See Ops."""
        hidden.add_(added)

    def linear(self, layer: Linear, rows: Tensor) -> Tensor:
        """See Ops."""
        return layer(rows)

    def largest(self, layer: Linear, rows: Tensor) -> Tensor:
        """See Ops."""
        return largest(layer(rows).float())

    def rotate_and_store(
        self, step: Step, layer: int, projected: Tensor, query_key_norm: Tensor | None, table: RotaryTable
    ) -> Tensor:
        """See Ops."""
        num_heads, num_kv_heads = self._config.num_heads, self._config.num_kv_heads
        heads = projected.view(projected.shape[0], -1, self._config.head_dim)  # queries, keys, values
        rotated = heads[:, : num_heads + num_kv_heads]
        if query_key_norm is not None:
            rotated = self.norm(rotated, query_key_norm)
        rotated = rotate(rotated, *table.at(step.batch.positions))
        step.attention.write(layer, rotated[:, num_heads:], heads[:, num_heads + num_kv_heads :], step.batch.slots)
        if step.on_layer is not None:
            step.on_layer(layer)
        return rotated[:, :num_heads]

    def attend(self, step: Step, layer: int, query: Tensor, form: AttentionForm) -> Tensor:
        """See Ops."""
        return step.attention.attend(layer, query, step.batch, form).flatten(1)

    def activate(self, gate_up: Tensor) -> Tensor:
        """See Ops."""
        gate, up = gate_up.chunk(2, dim=-1)
        return self._activate(gate).mul_(up)
