"""Attention one row and one head at a time: slow, obviously right, and what every other backend is held equal to."""

from __future__ import annotations

import torch
from torch import Tensor

from services.engine.attention.form import PLAIN, AttentionForm
from services.engine.attention.pages import PagedKv
from services.engine.batch import ForwardBatch


class OracleAttention(PagedKv):
    """softmax(cap(scale * q k^T)) v in float64."""

    def attend(self, layer: int, query: Tensor, batch: ForwardBatch, form: AttentionForm = PLAIN) -> Tensor:
        """Causal attention of query (num_tokens, num_heads, head_dim); the same shape."""
        mixed = torch.empty_like(query)
        starts, contexts = batch.query_starts.tolist(), batch.context_lengths.tolist()
        queries_per_kv_head = query.shape[1] // self.kv.shape[3]
        for sequence, context in enumerate(contexts):
            key, value = self._context(layer, batch.block_tables[sequence].tolist(), context)
            rows = range(starts[sequence], starts[sequence + 1])
            for row in rows:
                limit = context - (rows.stop - row) + 1
                visible = slice(form.first_visible(limit), limit)
                for head in range(query.shape[1]):
                    kv_head = head // queries_per_kv_head
                    scores = key[visible, kv_head] @ query[row, head].double() * form.scale_for(self.head_dim)
                    if form.softcap is not None:
                        scores = form.softcap * torch.tanh(scores / form.softcap)
                    mixed[row, head] = (scores.softmax(0) @ value[visible, kv_head]).to(query.dtype)
        return mixed

    def _context(self, layer: int, pages: list[int], context: int) -> tuple[Tensor, Tensor]:
        """Keys and values, (context, num_kv_heads, head_dim) float64 each, collected token by token."""
        slots = [(pages[token // self.page_size], token % self.page_size) for token in range(context)]
        key = torch.stack([self.kv[layer, page, 0, :, offset].double() for page, offset in slots])
        value = torch.stack([self.kv[layer, page, 1, :, offset].double() for page, offset in slots])
        return key, value
