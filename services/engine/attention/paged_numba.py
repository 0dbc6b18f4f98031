"""Attention on the CPU in float32: decoding rows by a kernel that reads pages in place, long chunks by torch.

A decoding row reads its whole context to use it once, so the gather would cost more than the attention: the kernel
takes 1.3 ms a layer for 16 sequences of 500 tokens (9 heads, 3 kv heads of 64, one core), gathering 15 ms. A chunk
uses what it gathered for every row, and torch's matrix products then run at 70 GFLOP/s, which numba does not reach.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.engine.attention.form import PLAIN, AttentionForm
from services.engine.attention.gather_sdpa import GatherSdpaAttention
from services.engine.attention.numba_kernels import attend_rows
from services.engine.batch import ForwardBatch

MAX_KERNEL_ROWS = 16  # beyond, gathering and multiplying matrices is as fast as so many rows one by one


@dataclass(frozen=True, slots=True)
class _Split:
    """Which sequences of a batch take which path, and the batch as the kernel reads it."""

    batch: ForwardBatch
    short: NDArray[np.int32]
    long: list[int]
    query_starts: NDArray[np.int32]
    context_lengths: NDArray[np.int32]
    block_tables: NDArray[np.int32]


class PagedNumbaAttention(GatherSdpaAttention):
    """Which path a sequence takes depends on its own rows only, so other sequences never change its result."""

    def __init__(self, kv: Tensor, max_kernel_rows: int = MAX_KERNEL_ROWS) -> None:
        if kv.device.type != "cpu" or kv.dtype != torch.float32:
            raise ValueError(f"paged_numba computes float32 on the CPU, not {kv.dtype} on {kv.device}")
        super().__init__(kv)
        self._pools = [layer.numpy() for layer in kv]
        self._max_kernel_rows = max_kernel_rows
        self._split: _Split | None = None
        self._weights = np.empty((1, 1), dtype=np.float32)
        self._exponents = np.empty(1, dtype=np.int32)
        self._load_kernel()

    def attend(self, layer: int, query: Tensor, batch: ForwardBatch, form: AttentionForm = PLAIN) -> Tensor:
        """Causal attention of query (num_tokens, num_heads, head_dim); the same shape. A soft cap is left to torch."""
        if form.softcap is not None:
            return super().attend(layer, query, batch, form)
        if self._split is None or self._split.batch is not batch:
            self._split = self._split_batch(batch, query.shape[1] // self.kv.shape[3])
        split = self._split
        mixed = torch.empty_like(query, memory_format=torch.contiguous_format)
        if split.short.size:
            attend_rows(
                mixed.numpy(),
                (query * (math.log2(math.e) * form.scale_for(self.head_dim))).contiguous().numpy(),
                self._pools[layer],
                split.short,
                split.query_starts,
                split.context_lengths,
                split.block_tables,
                form.window or int(split.context_lengths.max()),
                self._weights,
                self._exponents,
            )
        if split.long:
            self.attend_into(mixed, layer, query, batch, split.long, form)
        return mixed

    def _split_batch(self, batch: ForwardBatch, queries_per_kv_head: int) -> _Split:
        starts, contexts = batch.query_starts.numpy(), batch.context_lengths.numpy()
        short = np.diff(starts) <= self._max_kernel_rows
        longest = int(contexts[short].max(initial=1))
        if self._weights.shape[0] != queries_per_kv_head or self._weights.shape[1] < longest:
            self._weights = np.empty((queries_per_kv_head, 2 * longest), dtype=np.float32)
            self._exponents = np.empty(2 * longest, dtype=np.int32)
        tables = np.ascontiguousarray(batch.block_tables.numpy())
        ids = np.arange(len(contexts), dtype=np.int32)
        return _Split(batch, ids[short], ids[~short].tolist(), starts, contexts, tables)

    def _load_kernel(self) -> None:
        """Compiles the kernel, or loads it from disk, now rather than within the first request: no rows, no work."""
        rows, table = np.empty((0, 1, self.head_dim), dtype=np.float32), np.empty((0, 1), dtype=np.int32)
        none = np.empty(0, dtype=np.int32)
        attend_rows(rows, rows, self._pools[0], none, none, none, table, 1, self._weights, self._exponents)
