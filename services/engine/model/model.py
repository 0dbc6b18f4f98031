"""What the engine needs of a model, whoever computes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from services.engine.attention.backend import AttentionBackend
from services.engine.batch import ForwardBatch


class ModelShape(Protocol):
    """What the engine around a model must know of it; ModelConfig is one."""

    @property
    def vocab_size(self) -> int:
        """Logits of a row."""

    @property
    def max_context(self) -> int:
        """Tokens, prompt and output together."""

    @property
    def num_layers(self) -> int:
        """Layers that keep KV."""

    @property
    def num_heads(self) -> int:
        """Heads of queries in most layers."""

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and of values in each layer."""

    @property
    def head_dim(self) -> int:
        """Elements of a key and of a value."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""


class Model(Protocol):
    """Computes packed batches; Decoder is one."""

    @property
    def config(self) -> ModelShape:
        """Its shape, or that of the part that this rank has."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in; KV may be kept in another type."""

    def forward(
        self, batch: ForwardBatch, attention: AttentionBackend, on_layer: Callable[[int], None] | None = None
    ) -> Tensor:
        """Hidden states, (num_tokens, hidden), right in the rows of batch.last (None: all); on_layer(l) once the KV of
        layer l is written, or queued on a GPU."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits, (rows, vocab) float32, of some rows of the hidden states."""

    def largest(self, hidden: Tensor) -> Tensor:
        """(rows,) int64: the token of the largest logit of each row, which costs less than asking for all logits."""
