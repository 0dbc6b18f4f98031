"""Attention on a GPU by the flash-attn package, version 2, which reads pages of 256 tokens or multiples of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from services.engine.attention.backend import BackendUnavailable
from services.engine.attention.form import PLAIN, AttentionForm
from services.engine.attention.gather_sdpa import GatherSdpaAttention
from services.engine.attention.paged_metadata import MetadataOfBatch, check_flash_pool, require_parameters
from services.engine.batch import ForwardBatch

WANTED = ("block_table", "softcap", "window_size", "softmax_scale", "causal")


class FlashAttnAttention(GatherSdpaAttention):
    """One call of flash_attn_varlen_func a layer for decoding and chunks alike; scale, window and cap are its own."""

    def __init__(self, kv: Tensor) -> None:
        self._attend: Callable[..., Any] = _find()
        check_flash_pool(kv, page_multiple=256)
        super().__init__(kv)
        self._metadata = MetadataOfBatch(kv.device)

    def attend(self, layer: int, query: Tensor, batch: ForwardBatch, form: AttentionForm = PLAIN) -> Tensor:
        """Causal attention of query (num_tokens, num_heads, head_dim); the same shape."""
        known, pool = self._metadata.of(batch), self.kv[layer]
        mixed: Tensor = self._attend(
            query.contiguous(),
            pool[:, 0].transpose(1, 2),  # (pages, page_size, kv_heads, head_dim)
            pool[:, 1].transpose(1, 2),
            known.query_starts,
            known.context_starts,
            known.most_rows,
            known.longest,
            softmax_scale=form.scale_for(self.head_dim),
            causal=True,
            window_size=(form.window_left, 0),
            softcap=form.softcap or 0.0,
            block_table=known.tables,
        )
        return mixed


def _find() -> Callable[..., Any]:
    """flash_attn_varlen_func, if it is installed and knows pages."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:
        raise BackendUnavailable(f"flash_attn is not installed ({error})") from None
    function: Callable[..., Any] = flash_attn_varlen_func
    require_parameters(function, WANTED, "this flash_attn")
    return function
