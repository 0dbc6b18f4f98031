"""Attention on a GPU with a kernel of our own for decoding, over pages of any size; chunks of prompts go to torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from services.engine.attention.backend import BackendUnavailable
from services.engine.attention.form import PLAIN, AttentionForm
from services.engine.attention.gather_sdpa import GatherSdpaAttention
from services.engine.attention.pages import to_device
from services.engine.batch import ForwardBatch

SPLITS = 16  # pieces of a context; with 8 kv heads one sequence then occupies a GPU of 132 processors
LEAST = 128  # tokens in a piece
BLOCK = 64  # of them at a time
UNBOUNDED = 2**30  # a window longer than any context
LEAST_DOT = 16  # rows and columns that tl.dot wants at least


@dataclass(frozen=True, slots=True)
class _Parts:
    """The sequences of a batch that the kernel computes, and the others."""

    rows: Tensor  # (count, 2) int32, on the device: the packed row, and the sequence that has it alone
    contexts: Tensor  # (count,) int32, on the device: tokens of these sequences
    others: tuple[int, ...]  # sequences of several rows


class TritonPagedAttention(GatherSdpaAttention):
    """Sequences with one row are computed by triton_kernels.py, whatever else is in the batch."""

    def __init__(self, kv: Tensor) -> None:
        try:
            import triton

            from services.engine.attention import triton_kernels
        except ImportError:
            raise BackendUnavailable("triton is not installed") from None
        if kv.device.type != "cuda" and not triton.knobs.runtime.interpret:
            raise BackendUnavailable(f"triton computes on a GPU, not on {kv.device}")
        if kv.stride(-1) != 1:
            raise BackendUnavailable("the elements of a head do not lie side by side")
        super().__init__(kv)
        self._kernels: Any = triton_kernels
        self._next_power: Any = triton.next_power_of_2
        self._known: tuple[ForwardBatch, _Parts] | None = None
        self._each: dict[int, Tensor] = {}  # rows of batches of single rows; captured graphs read them too

    def attend(self, layer: int, query: Tensor, batch: ForwardBatch, form: AttentionForm = PLAIN) -> Tensor:
        """Causal attention of query (num_tokens, num_heads, head_dim); the same shape."""
        mixed = torch.empty_like(query, memory_format=torch.contiguous_format)
        parts = self._parts(batch)
        if len(parts.rows):
            self._decode(mixed, layer, query, batch, parts, form)
        if parts.others:
            self.attend_into(mixed, layer, query, batch, parts.others, form)
        return mixed

    def _parts(self, batch: ForwardBatch) -> _Parts:
        """Found once a batch: all layers ask for the same."""
        known = self._known
        if known is None or known[0] is not batch:
            known = self._known = (batch, self._divide(batch))
        return known[1]

    def _divide(self, batch: ForwardBatch) -> _Parts:
        device = self.kv.device
        if batch.num_tokens == batch.num_sequences:
            contexts = to_device(batch.context_lengths, device) if batch.contexts is None else batch.contexts
            return _Parts(self._rows_of_each(batch.num_tokens), contexts, ())
        counts = batch.query_starts.diff()
        single = (counts == 1).nonzero().flatten()
        rows = torch.stack((batch.query_starts[single], single.int()), dim=1)
        others = tuple((counts != 1).nonzero().flatten().tolist())
        return _Parts(to_device(rows, device), to_device(batch.context_lengths[single], device), others)

    def _rows_of_each(self, count: int) -> Tensor:
        if count not in self._each:
            numbers = torch.arange(count, dtype=torch.int32, device=self.kv.device)
            self._each[count] = torch.stack((numbers, numbers), dim=1)
        return self._each[count]

    def _decode(
        self, mixed: Tensor, layer: int, query: Tensor, batch: ForwardBatch, parts: _Parts, form: AttentionForm
    ) -> None:
        """Fills the rows of sequences that have one."""
        rows, contexts = parts.rows, parts.contexts
        pool, device, num_heads, count = self.kv[layer], self.kv.device, query.shape[1], len(rows)
        values = torch.empty(count, num_heads, SPLITS, self.head_dim, device=device)
        stats = torch.empty(count, num_heads, SPLITS, 2, device=device)
        group = num_heads // pool.shape[2]
        dims = max(LEAST_DOT, self._next_power(self.head_dim))
        tables = batch.block_tables.contiguous()
        self._kernels.attend_piece[(count, pool.shape[2], SPLITS)](
            query, pool, tables, contexts, rows, values, stats,
            form.scale_for(self.head_dim), form.softcap or 1.0, form.window or UNBOUNDED,
            query.stride(0), query.stride(1), *pool.stride()[:4], tables.stride(0), SPLITS,
            GROUP=group, GROUP_ROWS=max(LEAST_DOT, self._next_power(group)), HEAD_DIM=self.head_dim, DIMS=dims,
            PAGE_SIZE=self.page_size, LEAST=LEAST, BLOCK=BLOCK, HAS_CAP=form.softcap is not None,
            enable_fp_fusion=True,  # Triton 3.9 warns where it is not said, and 3.10 takes another default
        )  # fmt: skip
        self._kernels.add_pieces[(count, num_heads)](
            values, stats, rows, mixed, mixed.stride(0), mixed.stride(1), SPLITS,
            HEAD_DIM=self.head_dim, DIMS=dims, SPLITS=self._next_power(SPLITS), enable_fp_fusion=True,
        )  # fmt: skip
