"""Sequences over a poisoned KV pool, computed step by step as an engine would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from services.engine.attention.backend import AttentionBackend
from services.engine.attention.factory import make_attention
from services.engine.batch import ForwardBatch
from services.engine.model.decoder import Decoder

BACKENDS = ("paged_numba", "gather_sdpa")
RELATIVE_ERROR = 1e-4


@dataclass
class PagedSequence:
    """A sequence whose first `computed` tokens have their KV in `pages`."""

    token_ids: list[int]
    pages: list[int] = field(default_factory=list)
    computed: int = 0


class PagedRunner:
    """A model over a pool of NaN, with pages handed out in random order."""

    def __init__(self, model: Decoder, backend: str | None = None, num_pages: int = 64, page_size: int = 16) -> None:
        config = model.config
        shape = (config.num_layers, num_pages, 2, config.num_kv_heads, page_size, config.head_dim)
        self.model = model
        self.kv = torch.full(shape, torch.nan, dtype=model.dtype, device=model.device)
        self.page_size = page_size
        self.attention: AttentionBackend = make_attention(backend, self.kv, config)
        self._free = torch.randperm(num_pages, generator=torch.Generator().manual_seed(0)).tolist()

    def step(
        self, work: Sequence[tuple[PagedSequence, int]], on_layer: Callable[[int], None] | None = None
    ) -> list[Tensor]:
        """Computes the next n tokens of each sequence in one batch; logits of each, (n, vocab)."""
        batch = self.batch(work)
        hidden = self.model.forward(batch, self.attention, on_layer)
        for sequence, count in work:
            sequence.computed += count
        return list(self.model.logits(hidden[batch.logits_rows]).split([count for _, count in work]))

    def prefill(self, token_ids: Sequence[int]) -> Tensor:
        """Logits of a whole prompt computed at once, (num_tokens, vocab)."""
        return self.step([(PagedSequence(list(token_ids)), len(token_ids))])[0]

    def batch(self, work: Sequence[tuple[PagedSequence, int]]) -> ForwardBatch:
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        for sequence, count in work:
            stop = sequence.computed + count
            while len(sequence.pages) * self.page_size < stop:
                sequence.pages.append(self._free.pop())
            for position in range(sequence.computed, stop):
                token_ids.append(sequence.token_ids[position])
                positions.append(position)
                page = sequence.pages[position // self.page_size]
                slots.append(page * self.page_size + position % self.page_size)
        widest = max(len(sequence.pages) for sequence, _ in work)
        # Entries past the context are garbage on purpose.
        tables = [sequence.pages + [2**31 - 1] * (widest - len(sequence.pages)) for sequence, _ in work]
        counts = [count for _, count in work]
        return ForwardBatch(
            token_ids=torch.tensor(token_ids),
            positions=torch.tensor(positions),
            slots=torch.tensor(slots),
            query_starts=torch.tensor([0, *counts]).cumsum(0).int(),
            context_lengths=torch.tensor([s.computed + count for s, count in work], dtype=torch.int32),
            block_tables=torch.tensor(tables, dtype=torch.int32),
            logits_rows=torch.arange(len(token_ids)),
        )


def relative_error(values: Tensor, expected: Tensor) -> float:
    """max |a - b| / max |b|; NaN if there is one anywhere."""
    return float((values - expected).abs().max() / expected.abs().max())


def random_tokens(count: int, vocab_size: int, seed: int = 0) -> list[int]:
    return torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
