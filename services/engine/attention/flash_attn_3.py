"""Attention on a GPU by FlashAttention 3, for those of the Hopper generation: it reads pages of any size in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from services.engine.attention.backend import BackendUnavailable
from services.engine.attention.form import PLAIN, AttentionForm
from services.engine.attention.gather_sdpa import GatherSdpaAttention
from services.engine.attention.paged_metadata import MetadataOfBatch, check_flash_pool, require_parameters
from services.engine.batch import ForwardBatch

WANTED = ("page_table", "cache_seqlens", "cu_seqlens_q", "max_seqlen_q", "softmax_scale", "window_size", "softcap",
          "causal")  # fmt: skip


class FlashAttn3Attention(GatherSdpaAttention):
    """One call of flash_attn_with_kvcache a layer for decoding and chunks alike; what it might add is in the pages."""

    def __init__(self, kv: Tensor) -> None:
        self._attend: Callable[..., Any] = _find()
        check_flash_pool(kv, page_multiple=1)
        super().__init__(kv)
        self._metadata = MetadataOfBatch(kv.device)

    def attend(self, layer: int, query: Tensor, batch: ForwardBatch, form: AttentionForm = PLAIN) -> Tensor:
        """Causal attention of query (num_tokens, num_heads, head_dim); the same shape."""
        known, pool = self._metadata.of(batch), self.kv[layer]
        mixed: Tensor = self._attend(
            query.contiguous(),
            pool[:, 0].transpose(1, 2),  # (pages, page_size, kv_heads, head_dim)
            pool[:, 1].transpose(1, 2),
            cache_seqlens=known.contexts,
            page_table=known.tables,
            cu_seqlens_q=known.query_starts,
            max_seqlen_q=known.most_rows,
            softmax_scale=form.scale_for(self.head_dim),
            causal=True,
            window_size=(form.window_left, 0),
            softcap=form.softcap or 0.0,
        )
        return mixed


def _find() -> Callable[..., Any]:
    """flash_attn_with_kvcache of version 3, which is a package beside that of version 2."""
    try:
        from flash_attn_interface import flash_attn_with_kvcache
    except ImportError as error:
        raise BackendUnavailable(f"flash_attn_interface is not installed ({error})") from None
    function: Callable[..., Any] = flash_attn_with_kvcache
    require_parameters(function, WANTED, "this flash_attn_interface")
    return function
