"""Whether a model with our attention computes what it computes with its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from services.engine.attention.gather_sdpa import GatherSdpaAttention
from services.engine.batch import ForwardBatch
from services.engine.model.errors import UnsupportedModel
from services.engine.model.foreign.model import ForeignModel

TOLERANCE, HALF_TOLERANCE = 1e-3, 0.1  # of the largest logit, in float32 and in 16 bits
PAGE_SIZE = 8
LENGTHS = (21, 13)  # tokens of the sequences, computed side by side in two pieces


@dataclass(frozen=True, slots=True)
class Proof:
    """Sequences and what the model made of them by itself: logits (num_tokens, vocab) for each."""

    tokens: list[list[int]]
    logits: list[Tensor]

    @staticmethod
    def of(model: Any, vocab_size: int) -> Proof:
        """Random sequences through a model of transformers as it came."""
        generator = torch.Generator().manual_seed(0)
        tokens = [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in LENGTHS]
        ids = [torch.tensor([sequence], device=model.device) for sequence in tokens]
        return Proof(tokens, [model(input_ids=each, use_cache=False).logits[0].float() for each in ids])

    def checked(self, model: ForeignModel) -> ForeignModel:
        """The model, whose sequences over pages, beside each other and in pieces, give the same. Else raises
        UnsupportedModel.

        State that is not in the KV, sight of what a row should not see, positions of another kind: all show here.
        """
        halves = [length // 2 for length in LENGTHS]
        attention = GatherSdpaAttention(_pool(model))
        pieces: list[list[Tensor]] = [[] for _ in self.tokens]
        for begins, ends in (([0] * len(halves), halves), (halves, list(LENGTHS))):
            hidden = model.forward(_batch(self.tokens, begins, ends, model.device), attention)
            counts = [end - begin for begin, end in zip(begins, ends, strict=True)]
            for piece, rows in zip(pieces, torch.split(model.logits(hidden), counts), strict=True):
                piece.append(rows)
        tolerance = TOLERANCE if model.dtype == torch.float32 else HALF_TOLERANCE
        for piece, expected in zip(pieces, self.logits, strict=True):
            error = float((torch.cat(piece) - expected).abs().max() / expected.abs().max())
            if not error <= tolerance:
                name = model.config.architecture
                raise UnsupportedModel(
                    f"{name} over pages differs from transformers by {error:.1e} of the largest logit."
                )
        return model


def _pool(model: ForeignModel) -> Tensor:
    shape = model.config
    num_pages = sum(-(-length // PAGE_SIZE) for length in LENGTHS)
    size = (shape.num_layers, num_pages, 2, shape.num_kv_heads, PAGE_SIZE, shape.head_dim)
    return torch.full(size, torch.nan, dtype=model.dtype, device=model.device)


def _batch(tokens: list[list[int]], begins: list[int], ends: list[int], device: torch.device) -> ForwardBatch:
    """Positions [begin, end) of each sequence, whose pages follow one another."""
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    tables: list[list[int]] = []
    starts, page = [0], 0
    for sequence, begin, end in zip(tokens, begins, ends, strict=True):
        num_pages = -(-len(sequence) // PAGE_SIZE)
        tables.append([*range(page, page + num_pages)])
        ids += sequence[begin:end]
        positions += range(begin, end)
        slots += range(page * PAGE_SIZE + begin, page * PAGE_SIZE + end)
        starts.append(len(ids))
        page += num_pages
    widest = max(map(len, tables))
    return ForwardBatch(
        token_ids=torch.tensor(ids, device=device),
        positions=torch.tensor(positions, device=device),
        slots=torch.tensor(slots, device=device),
        query_starts=torch.tensor(starts, dtype=torch.int32),
        context_lengths=torch.tensor(ends, dtype=torch.int32),
        block_tables=torch.tensor([t + [0] * (widest - len(t)) for t in tables], dtype=torch.int32, device=device),
        logits_rows=torch.arange(len(ids), device=device),
    )
