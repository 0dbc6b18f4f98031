"""Attention on a GPU by torch.nn.attention.varlen, which reads pages through a block table since torch 2.12."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from services.engine.attention.backend import BackendUnavailable
from services.engine.attention.form import PLAIN, AttentionForm
from services.engine.attention.gather_sdpa import GatherSdpaAttention
from services.engine.attention.paged_metadata import MetadataOfBatch, check_flash_pool, require_parameters
from services.engine.batch import ForwardBatch

WANTED = ("block_table", "seqused_k", "num_splits", "window_size", "enable_gqa", "scale")


class TorchVarlenAttention(GatherSdpaAttention):
    """One call a layer for decoding and chunks alike; layers with a soft cap, which it does not know, go to SDPA.

    num_splits is 1: paged split-KV of torch's FlashAttention-2 wrote only the first sequence (pytorch #194167).
    """

    def __init__(self, kv: Tensor) -> None:
        self._varlen_attn: Callable[..., Any] = _find()
        check_flash_pool(kv, page_multiple=256)
        super().__init__(kv)
        self._metadata = MetadataOfBatch(kv.device)

    def attend(self, layer: int, query: Tensor, batch: ForwardBatch, form: AttentionForm = PLAIN) -> Tensor:
        """Causal attention of query (num_tokens, num_heads, head_dim); the same shape."""
        if form.softcap is not None:
            return super().attend(layer, query, batch, form)
        known, pool = self._metadata.of(batch), self.kv[layer]
        mixed: Tensor = self._varlen_attn(
            query.contiguous(),
            pool[:, 0].transpose(1, 2),  # (pages, page_size, kv_heads, head_dim)
            pool[:, 1].transpose(1, 2),
            known.query_starts,
            known.context_starts,
            known.most_rows,
            known.longest,
            scale=form.scale_for(self.head_dim),
            window_size=(form.window_left, 0),
            enable_gqa=query.shape[1] != pool.shape[2],
            seqused_k=known.contexts,
            block_table=known.tables,
            num_splits=1,
        )
        return mixed


def _find() -> Callable[..., Any]:
    """varlen_attn, if this torch has it with block tables."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        raise BackendUnavailable(f"torch {torch.__version__} has no varlen_attn") from None
    require_parameters(varlen_attn, WANTED, f"varlen_attn of torch {torch.__version__}")
    return varlen_attn
