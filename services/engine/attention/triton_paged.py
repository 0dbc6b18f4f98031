"""Attention on a GPU with a kernel of our own for decoding, over pages of any size; chunks of prompts go to torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from services.engine.attention.backend import BackendUnavailable
from services.engine.attention.form import PLAIN, AttentionForm
from services.engine.attention.gather_sdpa import GatherSdpaAttention
from services.engine.batch import ForwardBatch

SPLIT = 512  # tokens of a context that one program reads
BLOCK = 64  # of them at a time
LEAST_DOT = 16  # rows and columns that tl.dot wants at least


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

    def attend(self, layer: int, query: Tensor, batch: ForwardBatch, form: AttentionForm = PLAIN) -> Tensor:
        """Causal attention of query (num_tokens, num_heads, head_dim); the same shape."""
        mixed = torch.empty_like(query, memory_format=torch.contiguous_format)
        counts = batch.query_starts.diff()
        single = (counts == 1).nonzero().flatten()
        if len(single):
            self._decode(mixed, layer, query, batch, single, form)
        if len(single) < batch.num_sequences:
            self.attend_into(mixed, layer, query, batch, (counts != 1).nonzero().flatten().tolist(), form)
        return mixed

    def _decode(
        self, mixed: Tensor, layer: int, query: Tensor, batch: ForwardBatch, single: Tensor, form: AttentionForm
    ) -> None:
        """Fills the rows of the sequences in `single`, (n,) int64 on the CPU."""
        pool, device, num_heads = self.kv[layer], self.kv.device, query.shape[1]
        contexts = batch.context_lengths[single]
        longest = int(contexts.max())
        num_splits = -(-longest // SPLIT)
        rows = torch.stack((batch.query_starts[single], single.int()), dim=1).to(device)
        values = torch.empty(len(single), num_heads, num_splits, self.head_dim, device=device)
        stats = torch.empty(len(single), num_heads, num_splits, 2, device=device)
        group = num_heads // pool.shape[2]
        dims = max(LEAST_DOT, self._next_power(self.head_dim))
        tables = batch.block_tables.contiguous()
        self._kernels.attend_piece[(len(single), pool.shape[2], num_splits)](
            query, pool, tables, contexts.to(device), rows, values, stats,
            form.scale_for(self.head_dim), form.softcap or 1.0, form.window or longest,
            query.stride(0), query.stride(1), *pool.stride()[:4], tables.stride(0), num_splits,
            GROUP=group, GROUP_ROWS=max(LEAST_DOT, self._next_power(group)), HEAD_DIM=self.head_dim, DIMS=dims,
            PAGE_SIZE=self.page_size, SPLIT=SPLIT, BLOCK=BLOCK, HAS_CAP=form.softcap is not None,
        )  # fmt: skip
        self._kernels.add_pieces[(len(single), num_heads)](
            values, stats, rows, mixed, mixed.stride(0), mixed.stride(1), num_splits,
            HEAD_DIM=self.head_dim, DIMS=dims, SPLITS=self._next_power(num_splits),
        )  # fmt: skip
