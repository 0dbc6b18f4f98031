"""Attention on a GPU by FlashInfer, whose page layout HND is that of our pool: it reads pages of any size in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from services.engine.attention.backend import BackendUnavailable
from services.engine.attention.form import PLAIN, AttentionForm
from services.engine.attention.gather_sdpa import GatherSdpaAttention
from services.engine.attention.paged_metadata import HALVES, check_flash_pool
from services.engine.attention.pages import to_device
from services.engine.attention.stored import FLOAT8
from services.engine.batch import ForwardBatch

WORKSPACE_BYTES = 128 << 20  # what its documentation asks for


class FlashInferAttention(GatherSdpaAttention):
    """One wrapper a form of attention, planned once a batch; layers of one form share its plan."""

    def __init__(self, kv: Tensor) -> None:
        try:
            from flashinfer import BatchPrefillWithPagedKVCacheWrapper
        except ImportError as error:
            raise BackendUnavailable(f"flashinfer is not installed ({error})") from None
        # KV of eight bits it converts to the query's type, block by block, in its own FlashAttention-2 kernels.
        check_flash_pool(kv, page_multiple=1, dtypes=(*HALVES, FLOAT8))
        if not kv[0].is_contiguous():
            raise BackendUnavailable("the pool is a part of a larger one")
        super().__init__(kv)
        self._make: Any = BatchPrefillWithPagedKVCacheWrapper
        self._wrappers: dict[AttentionForm, Any] = {}
        self._planned_batch: ForwardBatch | None = None
        self._planned: set[AttentionForm] = set()

    def attend(self, layer: int, query: Tensor, batch: ForwardBatch, form: AttentionForm = PLAIN) -> Tensor:
        """Causal attention of query (num_tokens, num_heads, head_dim); the same shape."""
        if self._planned_batch is not batch:
            self._planned_batch, self._planned = batch, set()
        if form not in self._planned:
            self._plan_form(batch, form, query)
            self._planned.add(form)
        mixed: Tensor = self._wrappers[form].run(query.contiguous(), self.kv[layer])
        return mixed

    def _plan_form(self, batch: ForwardBatch, form: AttentionForm, query: Tensor) -> None:
        if form not in self._wrappers:
            workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=self.kv.device)
            self._wrappers[form] = self._make(workspace, "HND")
        starts, indices, last = page_lists(batch, self.page_size)
        self._wrappers[form].plan(
            batch.query_starts,
            starts,
            indices,
            last,
            query.shape[1],
            self.kv.shape[3],
            self.head_dim,
            self.page_size,
            causal=True,
            sm_scale=form.scale_for(self.head_dim),
            window_left=form.window_left,
            logits_soft_cap=form.softcap,
            q_data_type=query.dtype,
            kv_data_type=self.kv.dtype,
        )


def page_lists(batch: ForwardBatch, page_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Block tables as FlashInfer takes them, int32.

    Starts (num_sequences + 1,) of each sequence's pages in the list, on the CPU; the list of all pages in use, on the
    device of the tables; and the tokens (num_sequences,) in each last page, on the CPU.
    """
    contexts = batch.context_lengths
    counts = (contexts + page_size - 1) // page_size
    starts = torch.cat((counts.new_zeros(1), counts.cumsum(0))).int()
    sequences = torch.repeat_interleave(torch.arange(len(counts)), counts)
    places = torch.arange(int(starts[-1])) - starts[sequences]
    device = batch.block_tables.device
    indices = batch.block_tables[to_device(sequences, device), to_device(places, device)].int()
    return starts, indices, contexts - (counts - 1) * page_size
