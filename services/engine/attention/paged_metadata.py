"""What FlashAttention-like kernels want to know of a batch, on the device, and what they ask of a pool."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from services.engine.attention.backend import BackendUnavailable
from services.engine.attention.pages import to_device
from services.engine.batch import ForwardBatch

LARGEST_HEAD = 256
HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Metadata:
    """Of one batch; tensors are int32 on the device."""

    query_starts: Tensor  # (num_sequences + 1,)
    contexts: Tensor  # (num_sequences,)
    context_starts: Tensor  # (num_sequences + 1,) prefix sums of the contexts
    tables: Tensor  # (num_sequences, max_pages)
    most_rows: int
    longest: int  # context


class MetadataOfBatch:
    """Computed once a batch: all layers ask for the same."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._batch: ForwardBatch | None = None
        self._metadata: Metadata | None = None

    def of(self, batch: ForwardBatch) -> Metadata:
        """The batch's."""
        if self._metadata is None or self._batch is not batch:
            contexts = batch.context_lengths
            starts = torch.cat((contexts.new_zeros(1), contexts.cumsum(0))).int()
            self._batch = batch
            self._metadata = Metadata(
                query_starts=to_device(batch.query_starts, self._device),
                contexts=to_device(contexts, self._device),
                context_starts=to_device(starts, self._device),
                tables=batch.block_tables.contiguous(),
                most_rows=int(batch.query_starts.diff().max()),
                longest=int(contexts.max()),
            )
        return self._metadata


def require_parameters(function: Callable[..., Any], wanted: Sequence[str], what: str) -> None:
    """Raises BackendUnavailable, naming them, for parameters that `function` lacks: `what` is another version then."""
    lacking = [name for name in wanted if name not in inspect.signature(function).parameters]
    if lacking:
        raise BackendUnavailable(f"{what} has no {', '.join(lacking)}")


def check_flash_pool(kv: Tensor, *, page_multiple: int, dtypes: Sequence[torch.dtype] = HALVES) -> None:
    """Raises BackendUnavailable for what FlashAttention, or a library like it that reads `dtypes`, does not compute."""
    page_size, head_dim = kv.shape[4], kv.shape[5]
    if kv.device.type != "cuda":
        raise BackendUnavailable(f"it computes on a GPU, not on {kv.device}")
    if kv.dtype not in dtypes:
        names = " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise BackendUnavailable(f"it reads {names}, not {kv.dtype}")
    if page_size % page_multiple:
        raise BackendUnavailable(f"it wants pages of a multiple of {page_multiple} tokens, not {page_size}")
    if head_dim % 8 or head_dim > LARGEST_HEAD:
        raise BackendUnavailable(f"it wants heads of a multiple of 8, {LARGEST_HEAD} at most, not {head_dim}")
    if kv.stride(-1) != 1:
        raise BackendUnavailable("the elements of a head do not lie side by side")
