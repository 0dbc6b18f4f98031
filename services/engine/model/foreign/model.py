"""A causal model of transformers as the engine wants a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from services.engine.attention.backend import AttentionBackend
from services.engine.batch import ForwardBatch
from services.engine.largest import largest
from services.engine.model.foreign.interface import PagedStep, computing


@dataclass(frozen=True, slots=True)
class ForeignConfig:
    """See ModelShape."""

    architecture: str
    vocab_size: int
    max_context: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eos_token_ids: tuple[int, ...]


class ForeignModel:
    """See Model. The body gives hidden states; all that a model does with them afterwards is its head."""

    def __init__(self, config: ForeignConfig, model: Any) -> None:
        self.config = config
        self._model = model
        self._body = _Body(getattr(model, model.base_model_prefix))
        setattr(model, model.base_model_prefix, self._body)

    @property
    def device(self) -> torch.device:
        device: torch.device = self._model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._model.dtype
        return dtype

    @torch.inference_mode()
    def forward(
        self, batch: ForwardBatch, attention: AttentionBackend, on_layer: Callable[[int], None] | None = None
    ) -> Tensor:
        """See Model."""
        with computing(PagedStep(batch, attention, on_layer, self.config.max_context)):
            output = self._body(input_ids=batch.token_ids[None], position_ids=batch.positions[None], use_cache=False)
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """See Model."""
        self._body.given = hidden[None]
        try:
            # The ids are for the count of tokens only: the body does not compute.
            ids = torch.zeros(1, hidden.shape[0], dtype=torch.int64, device=hidden.device)
            logits: Tensor = self._model(input_ids=ids, use_cache=False).logits[0].float()
        finally:
            self._body.given = None
        return logits

    def largest(self, hidden: Tensor) -> Tensor:
        """See Model."""
        return largest(self.logits(hidden))


class _Body(torch.nn.Module):
    """The body of a model, or what stands for its result while only the head is wanted."""

    def __init__(self, body: torch.nn.Module) -> None:
        super().__init__()
        self.body = body
        self.given: Tensor | None = None  # (1, num_tokens, hidden)

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """See the body."""
        if self.given is None:
            return self.body(*arguments, **options)
        return _Given(self.given)


class _Given:
    """What a body returns, as heads read it: hidden states, and none of what it may return besides."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None
