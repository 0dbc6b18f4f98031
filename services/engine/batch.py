"""What one engine step computes, as tensors: the runner builds it, the model and the attention backends read it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """The tokens of all sequences of one step, packed one sequence after the other.

    Sequence s owns the packed rows [query_starts[s], query_starts[s + 1]), at least one. Its row i of q sees the
    first context_lengths[s] - q + i + 1 tokens of the sequence, itself included; their KV is found through
    block_tables[s], and is written before it is read, so a row also sees the rows before it in the same batch.
    """

    token_ids: Tensor  # (num_tokens,) int64
    positions: Tensor  # (num_tokens,) int64, absolute: the first token of a sequence is 0
    slots: Tensor  # (num_tokens,) int64, page_id * page_size + offset: where the KV of this token is written
    query_starts: Tensor  # (num_sequences + 1,) int32 prefix sums of the rows per sequence, on the CPU
    context_lengths: Tensor  # (num_sequences,) int32, tokens visible to the last row of the sequence, on the CPU
    block_tables: Tensor  # (num_sequences, max_pages) int32 page ids; entries past the context are ignored
    logits_rows: Tensor  # (num_rows,) int64, packed rows whose logits are wanted, may be empty
    contexts: Tensor | None = None  # context_lengths on the device, where they are there already
    last: LastRows | None = None  # the rows that the last layer need compute; None: all
    single_rows: Tensor | None = (
        None  # (num_sequences,) int32, on the CPU: last rows to compute one by one, no others; None: all may be
    )

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def num_sequences(self) -> int:
        return self.context_lengths.shape[0]


@dataclass(frozen=True, slots=True)
class LastRows:
    """The rows of a batch whose hidden states are wanted. Of the others the last layer need write the KV only."""

    rows: Tensor  # (num_rows,) int64, packed rows of the whole batch, may be empty
    batch: ForwardBatch  # the same rows as a batch of their own


def last_rows(batch: ForwardBatch, counts: NDArray[np.int64]) -> LastRows:
    """Of each sequence its last rows, as many as `counts` (num_sequences,) says."""
    ends, offsets = batch.query_starts.numpy()[1:], counts.cumsum()
    rows = torch.from_numpy(np.arange(counts.sum()) + np.repeat(ends - offsets, counts)).to(batch.token_ids.device)
    some = counts > 0
    own = ForwardBatch(
        token_ids=batch.token_ids[rows],
        positions=batch.positions[rows],
        slots=batch.slots[rows],
        query_starts=torch.from_numpy(np.concatenate(([0], offsets[some])).astype(np.int32)),
        context_lengths=batch.context_lengths[torch.from_numpy(some)],
        block_tables=batch.block_tables[torch.from_numpy(some).to(batch.block_tables.device)],
        logits_rows=batch.logits_rows[:0],
        single_rows=None if batch.single_rows is None else batch.single_rows[torch.from_numpy(some)],
    )
    return LastRows(rows, own)
