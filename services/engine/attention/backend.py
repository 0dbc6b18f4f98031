"""The interface between the model and paged KV."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from services.engine.attention.form import PLAIN, AttentionForm
from services.engine.batch import ForwardBatch


class BackendUnavailable(ValueError):
    """A backend cannot compute this pool, or its library is not there. The message is one phrase that says why."""


class AttentionBackend(Protocol):
    """Writes and reads one KV pool of shape (num_layers, num_pages, 2, num_kv_heads, page_size, head_dim).

    Pages and slots outside a sequence's context may hold anything, NaN too: nothing of it may reach a result.
    A sequence's result does not depend on the other sequences of the batch, up to float32 rounding.
    """

    def write(self, layer: int, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Stores key and value, each (num_tokens, num_kv_heads, head_dim), at slots (num_tokens,) int64."""

    def attend(self, layer: int, query: Tensor, batch: ForwardBatch, form: AttentionForm = PLAIN) -> Tensor:
        """Causal attention of query (num_tokens, num_heads, head_dim) over the written context; the same shape."""
