"""What one engine step computes, as tensors: the runner builds it, the model and the attention backends read it."""

from __future__ import annotations

from dataclasses import dataclass

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

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def num_sequences(self) -> int:
        return self.context_lengths.shape[0]
