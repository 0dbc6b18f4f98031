"""Attention on any device: gather each context out of its pages, then torch's scaled_dot_product_attention."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from services.engine.attention.form import PLAIN, AttentionForm
from services.engine.attention.pages import PagedKv, to_device
from services.engine.batch import ForwardBatch

# Rows of a chunk computed by one call. A call computes every row against the context of its last one, so small
# blocks waste less; measured on one core at 3,000 tokens: 74 GFLOP/s with 64 rows, 35 with no blocks. A GPU wants
# few large calls.
ROWS_PER_CALL_CPU, ROWS_PER_CALL_GPU = 64, 2048


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows [start, stop) of each sequence of a group, and what they see of the gathered slots."""

    start: int
    stop: int
    slots: slice  # of the gathered ones; no row of the block sees another
    visible: Tensor  # (num_sequences, 1, queries_per_kv_head * (stop - start), num_slots) bool


@dataclass(frozen=True, slots=True)
class _Group:
    """Sequences computed together: they have equally many rows and are padded to equally many pages."""

    rows: Tensor  # (num_sequences, num_rows) int64, packed rows
    pages: Tensor  # (num_sequences, num_pages) int64, from the first that a row sees; page 0 where padded
    unwritten: Tensor  # (num_sequences, 1, num_slots, 1) bool, slots past the context
    blocks: tuple[_Block, ...]


class GatherSdpaAttention(PagedKv):
    """One group for all decoding sequences of similar length, one for each longer chunk."""

    def __init__(self, kv: Tensor) -> None:
        super().__init__(kv)
        self._planned_for: ForwardBatch | None = None
        self._plans: dict[tuple[int | None, tuple[int, ...]], list[_Group]] = {}  # by window and sequences

    def attend(self, layer: int, query: Tensor, batch: ForwardBatch, form: AttentionForm = PLAIN) -> Tensor:
        """Causal attention of query (num_tokens, num_heads, head_dim); the same shape."""
        mixed = torch.empty_like(query)
        self.attend_into(mixed, layer, query, batch, range(batch.num_sequences), form)
        return mixed

    def attend_into(
        self,
        mixed: Tensor,
        layer: int,
        query: Tensor,
        batch: ForwardBatch,
        sequences: Sequence[int],
        form: AttentionForm = PLAIN,
    ) -> None:
        """The same for some sequences of the batch; fills only their rows. Layers of one window share a plan."""
        kv_heads = self.kv.shape[3]
        if self._planned_for is not batch:
            self._planned_for, self._plans = batch, {}
        wanted = (form.window, tuple(sequences))
        if wanted not in self._plans:
            self._plans[wanted] = self._plan(batch, sequences, query.shape[1] // kv_heads, form)
        for group in self._plans[wanted]:
            # (sequences, pages, 2, kv_heads, page_size, head_dim)
            gathered = self.read_pages(layer, group.pages, query.dtype)
            gathered = gathered.permute(2, 0, 3, 1, 4, 5).reshape(2, len(group.pages), kv_heads, -1, self.head_dim)
            gathered.masked_fill_(group.unwritten, 0)  # 0 * NaN is NaN, so masking the scores is not enough
            for block in group.blocks:
                rows = group.rows[:, block.start : block.stop]
                mixed[rows] = _attend_block(query[rows], gathered[:, :, :, block.slots], block.visible, form)

    def _plan(
        self, batch: ForwardBatch, sequences: Sequence[int], queries_per_kv_head: int, form: AttentionForm
    ) -> list[_Group]:
        starts, contexts = batch.query_starts.tolist(), batch.context_lengths.tolist()
        alike: dict[tuple[int, int], list[int]] = defaultdict(list)
        for sequence in sequences:
            num_rows = starts[sequence + 1] - starts[sequence]
            first = form.first_visible(contexts[sequence] - num_rows + 1) // self.page_size
            num_pages = -(-contexts[sequence] // self.page_size) - first
            # Decoding sequences pad to a power of two of pages; a chunk is large enough for a group of its own.
            alike[(1, (num_pages - 1).bit_length()) if num_rows == 1 else (num_rows, -sequence)].append(sequence)
        return [
            self._group(batch, members, num_rows, queries_per_kv_head, form) for (num_rows, _), members in alike.items()
        ]

    def _group(
        self, batch: ForwardBatch, members: list[int], num_rows: int, queries_per_kv_head: int, form: AttentionForm
    ) -> _Group:
        device = self.kv.device
        rows_per_call = ROWS_PER_CALL_CPU if device.type == "cpu" else ROWS_PER_CALL_GPU
        # What follows from lengths is computed on the CPU, because asking a GPU for a number waits for it.
        context = batch.context_lengths[members][:, None]  # (num_sequences, 1)
        limit = context - num_rows + 1 + torch.arange(num_rows)  # tokens before the end of a row's view
        begin = limit * 0 if form.window is None else (limit - form.window).clamp(min=0)
        first_page = begin[:, :1] // self.page_size  # (num_sequences, 1)
        num_pages = int((-(-context // self.page_size) - first_page).max())
        page = first_page + torch.arange(num_pages)  # (num_sequences, num_pages) of the sequence
        in_use = page * self.page_size < context
        offset = first_page * self.page_size  # (num_sequences, 1), the token in the first gathered slot
        limit, begin = limit - offset, begin - offset  # from now on in gathered slots
        edges = [
            slice(int(begin[:, start].min()), int(limit[:, min(start + rows_per_call, num_rows) - 1].max()))
            for start in range(0, num_rows, rows_per_call)
        ]
        rows = batch.query_starts[members][:, None] + torch.arange(num_rows)
        numbers = torch.tensor(members)
        page, in_use, limit, begin, end, rows, numbers = (
            to_device(each, device) for each in (page, in_use, limit, begin, context - offset, rows, numbers)
        )
        table = batch.block_tables[numbers].to(torch.int64)
        pages = table.gather(1, page.where(in_use, 0)).where(in_use, 0)
        slot = torch.arange(num_pages * self.page_size, device=device)
        blocks = []
        for start, slots in zip(range(0, num_rows, rows_per_call), edges, strict=True):
            stop = min(start + rows_per_call, num_rows)
            seen = slot[slots]
            visible = (seen < limit[:, start:stop, None]) & (seen >= begin[:, start:stop, None])
            blocks.append(_Block(start, stop, slots, visible[:, None].repeat(1, 1, queries_per_kv_head, 1)))
        return _Group(rows, pages, (slot >= end)[:, None, :, None], tuple(blocks))


def _attend_block(query: Tensor, gathered: Tensor, visible: Tensor, form: AttentionForm) -> Tensor:
    """Attention of query (sequences, rows, heads, head_dim) over gathered (2, sequences, kv_heads, slots, head_dim)."""
    num_sequences, num_rows, num_heads, head_dim = query.shape
    key, value = gathered
    kv_heads = key.shape[1]
    # The query heads of one kv head become rows of one matrix: (sequences, kv_heads, heads * rows, head_dim).
    stacked = query.view(num_sequences, num_rows, kv_heads, -1, head_dim).permute(0, 2, 3, 1, 4)
    stacked = stacked.reshape(num_sequences, kv_heads, -1, head_dim)
    scale = form.scale_for(head_dim)
    if form.softcap is None:
        result = F.scaled_dot_product_attention(stacked, key, value, attn_mask=visible, scale=scale)
    else:
        scores = form.softcap * torch.tanh((stacked @ key.mT).float() * (scale / form.softcap))
        result = scores.masked_fill(~visible, -torch.inf).softmax(-1).to(value.dtype) @ value
    result = result.view(num_sequences, kv_heads, -1, num_rows, head_dim).permute(0, 3, 1, 2, 4)
    return result.reshape(num_sequences, num_rows, num_heads, head_dim)
