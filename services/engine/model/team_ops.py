"""The operations of a decoder on the CPU in float32: each adds jobs for a team of threads and computes nothing yet."""

from __future__ import annotations

from typing import cast

import numpy as np
from torch import Tensor

from services.engine.attention.form import AttentionForm
from services.engine.attention.paged_numba import PagedNumbaAttention
from services.engine.kernels.jobs import Jobs, rows_a_chunk
from services.engine.model import ops_kernels
from services.engine.model.config import Activation, ModelConfig
from services.engine.model.linear.linear import Linear, TeamLinear
from services.engine.model.ops import Step
from services.engine.model.rope import RotaryTable

_KINDS: dict[Activation, int] = {
    "silu": ops_kernels.SILU,
    "gelu_tanh": ops_kernels.GELU_TANH,
    "gelu": ops_kernels.GELU,
}


class TeamOps:
    """Records into `jobs`. Layers are TeamLinear, attention is paged_numba and fits; tensors hold values once the jobs
    have run. See Ops."""

    def __init__(self, config: ModelConfig, jobs: Jobs) -> None:
        self._config = config
        self._jobs = jobs
        self._epsilon = _bits(config.norm_eps)

    def embed(self, step: Step, embedding: Tensor, scale: float) -> Tensor:
        """See Ops."""
        num_rows, size = step.batch.num_tokens, embedding.shape[1]
        out = embedding.new_empty(num_rows, size)  # outlives the layers
        count, chunks = self._split(num_rows, size)
        self._jobs.add(ops_kernels.embed, chunks, self._jobs.facts, embedding, out, num_rows, size, count, _bits(scale))
        return out

    def norm(self, rows: Tensor, weight: Tensor) -> Tensor:
        """See Ops."""
        return self.add_norm(rows, None, weight)

    def add_norm(self, hidden: Tensor, added: Tensor | None, weight: Tensor) -> Tensor:
        """See Ops."""
        (num_rows, size), out = hidden.shape, self._jobs.take(*hidden.shape)
        count, chunks = self._split(num_rows, size)
        other = 0 if added is None else added
        self._jobs.add(ops_kernels.add_norm, chunks, hidden, other, weight, out, num_rows, size, count, self._epsilon)
        return out

    def add(self, hidden: Tensor, added: Tensor) -> None:
        """See Ops."""
        count, chunks = self._split(*hidden.shape)
        self._jobs.add(ops_kernels.add, chunks, hidden, added, *hidden.shape, count)

    def linear(self, layer: Linear, rows: Tensor) -> Tensor:
        """See Ops."""
        return cast(TeamLinear, layer).add_to(self._jobs, rows)

    def largest(self, layer: Linear, rows: Tensor) -> Tensor:
        """See Ops."""
        return cast(TeamLinear, layer).add_largest_to(self._jobs, rows)

    def rotate_and_store(
        self, step: Step, layer: int, projected: Tensor, query_key_norm: Tensor | None, table: RotaryTable
    ) -> Tensor:
        """See Ops; on_layer is called by whoever runs the jobs, at this place."""
        config, pool = self._config, cast(PagedNumbaAttention, step.attention).kv[layer]
        query = self._jobs.take(projected.shape[0], config.num_heads, config.head_dim)
        count, chunks = self._split(*projected.shape)
        norm = 0 if query_key_norm is None else query_key_norm
        shape = (projected.shape[0], count, config.num_heads, config.num_kv_heads, pool.shape[3], config.head_dim)
        addresses = (self._jobs.facts, projected, query, pool, norm, table.cosine, table.sine)
        self._jobs.add(ops_kernels.rotate_and_store, chunks, *addresses, *shape, self._epsilon)
        self._jobs.mark()
        return query

    def attend(self, step: Step, layer: int, query: Tensor, form: AttentionForm) -> Tensor:
        """See Ops."""
        return cast(PagedNumbaAttention, step.attention).add_to(self._jobs, layer, query, step.batch, form).flatten(1)

    def activate(self, gate_up: Tensor) -> Tensor:
        """See Ops."""
        num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = self._jobs.take(num_rows, size)
        count, chunks = self._split(num_rows, size)
        kind = _KINDS[self._config.activation]
        self._jobs.add(ops_kernels.activate, chunks, gate_up, out, num_rows, size, count, kind)
        return out

    def _split(self, num_rows: int, size: int) -> tuple[int, int]:
        """Rows of a chunk, and chunks."""
        count = rows_a_chunk(num_rows, size, self._jobs.team)
        return count, -(-num_rows // count)


def _bits(number: float) -> int:
    """A float32 as an argument of a kernel."""
    return int(np.float32(number).view(np.int32))
