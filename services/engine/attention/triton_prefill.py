"""Attention on a GPU with kernels of our own for decoding and for chunks of prompts, over pages of any size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from services.engine.attention.form import PLAIN, AttentionForm
from services.engine.attention.pages import to_device
from services.engine.attention.triton_paged import LEAST_DOT, UNBOUNDED, TritonPagedAttention
from services.engine.batch import ForwardBatch


@dataclass(frozen=True, slots=True)
class _Shape:
    """What a program computes at a time, and how."""

    rows: int  # rows times the query heads of a kv head, a power of two
    block: int  # tokens of the context
    warps: int
    stages: int


# Of half precision, by the elements of a head. Not tuned: no GPU has run them. Float32 is multiplied without tensor
# cores, and is there to be compared with.
HALF, HALF_WIDE, FLOAT32 = _Shape(128, 64, 8, 3), _Shape(64, 32, 4, 2), _Shape(32, 32, 4, 1)
WIDE = 128


class TritonPrefillAttention(TritonPagedAttention):
    """Decodes as TritonPagedAttention does; sequences of several rows are computed by triton_prefill_kernels.py."""

    def __init__(self, kv: Tensor) -> None:
        super().__init__(kv)
        from services.engine.attention import triton_prefill_kernels

        self._prefill_kernels: Any = triton_prefill_kernels
        self._tiles: tuple[ForwardBatch, Sequence[int], Tensor] | None = None

    def attend_into(
        self,
        mixed: Tensor,
        layer: int,
        query: Tensor,
        batch: ForwardBatch,
        sequences: Sequence[int],
        form: AttentionForm = PLAIN,
    ) -> None:
        """See GatherSdpaAttention."""
        pool, group = self.kv[layer], query.shape[1] // self.kv.shape[3]
        dims = max(LEAST_DOT, self._next_power(self.head_dim))
        shape = FLOAT32 if query.dtype == torch.float32 else HALF if dims <= WIDE else HALF_WIDE
        rows = max(shape.rows, self._next_power(group))
        known = self._tiles
        if known is None or known[0] is not batch or known[1] != sequences:  # all layers ask for the same
            known = self._tiles = batch, sequences, to_device(tiles_of(batch, sequences, rows // group), self.kv.device)
        tiles, tables = known[2], batch.block_tables.contiguous()
        self._prefill_kernels.attend_tile[(len(tiles), pool.shape[2])](
            query, pool, tables, tiles, mixed,
            form.scale_for(self.head_dim), form.softcap or 1.0, form.window or UNBOUNDED,
            query.stride(0), query.stride(1), *pool.stride()[:4], tables.stride(0), mixed.stride(0), mixed.stride(1),
            GROUP=group, ROWS=rows, HEAD_DIM=self.head_dim, DIMS=dims, PAGE_SIZE=self.page_size, BLOCK=shape.block,
            HAS_CAP=form.softcap is not None, num_warps=shape.warps, num_stages=shape.stages, enable_fp_fusion=True,
        )  # fmt: skip


def tiles_of(batch: ForwardBatch, sequences: Sequence[int], most_rows: int) -> Tensor:
    """The rows of some sequences in tiles of up to `most_rows`, (num_tiles, 4) int32 on the CPU.

    Of each: sequence, packed row of the first, how many rows, position of the first. Those that see most come first,
    so that none of them is left to the end.
    """
    chosen = torch.tensor(sequences)
    starts, counts = batch.query_starts[chosen], batch.query_starts.diff()[chosen]
    num_tiles = (counts + most_rows - 1) // most_rows
    which = torch.repeat_interleave(torch.arange(len(chosen)), num_tiles)
    offsets = (torch.arange(len(which)) - (num_tiles.cumsum(0) - num_tiles)[which]) * most_rows
    rows = (counts[which] - offsets).clamp(max=most_rows)
    positions = (batch.context_lengths[chosen] - counts)[which] + offsets
    tiles = torch.stack((chosen[which], starts[which] + offsets, rows, positions), dim=1).int()
    return tiles[positions.argsort(descending=True, stable=True)]
