"""Our attention behind the attention interface of transformers: what its models call instead of their own.

A call comes from deep inside a model, so what it needs of the step stands beside it, one step at a time in a thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from services.engine.attention.backend import AttentionBackend
from services.engine.attention.form import AttentionForm
from services.engine.batch import ForwardBatch
from services.engine.model.errors import UnsupportedModel

NAME = "microserve"
# Arguments that change what attention computes and that no backend of ours knows.
_FOREIGN_ARGUMENTS = ("s_aux", "sinks", "position_bias", "alibi", "head_mask", "indices", "cu_seq_lens_q")


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One call of a model's attention, as it was seen."""

    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int


@dataclass(slots=True)
class PagedStep:
    """A step that is being computed over pages."""

    batch: ForwardBatch
    attention: AttentionBackend
    on_layer: Callable[[int], None] | None
    max_context: int


@dataclass(slots=True)
class ProbeStep:
    """A run whose calls are only written down."""

    calls: list[AttentionCall] = field(default_factory=list)


_current = threading.local()


@contextmanager
def computing(step: PagedStep | ProbeStep) -> Iterator[None]:
    """What the attention of models works on within the block, in this thread."""
    _current.step = step
    try:
        yield
    finally:
        _current.step = None


def register() -> None:
    """Makes the interface known to transformers under NAME. No masks are made: attention knows what a row sees."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)


def attend(
    module: torch.nn.Module,
    query: Tensor,  # (1, num_heads, num_tokens, head_dim)
    key: Tensor,  # (1, num_kv_heads, num_tokens, head_dim)
    value: Tensor,  # (1, num_kv_heads, num_tokens, head_dim)
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """One layer's attention, (1, num_tokens, num_heads, head_dim). Raises UnsupportedModel for what we do not know."""
    for name in _FOREIGN_ARGUMENTS:
        if others.get(name) is not None:
            raise UnsupportedModel(f"Attention with {name} is not supported.")
    if attention_mask is not None or others.get("is_causal") is False:
        raise UnsupportedModel("Attention that is not causal is not supported.")
    layer, step = int(module.layer_idx), _current.step  # type: ignore[arg-type]
    if isinstance(step, ProbeStep):
        sizes = query.shape[1], key.shape[1], key.shape[3], value.shape[3]
        step.calls.append(AttentionCall(layer, *sizes))
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None
    step.attention.write(layer, key[0].transpose(0, 1), value[0].transpose(0, 1), step.batch.slots)
    if step.on_layer is not None:
        step.on_layer(layer)
    window = None if sliding_window is None or sliding_window >= step.max_context else sliding_window
    form = AttentionForm(scaling, window, softcap)
    return step.attention.attend(layer, query[0].transpose(0, 1).contiguous(), step.batch, form)[None], None
