"""The tensors of one step, sent in one copy; tokens that the step before chose are filled in on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, chain

import numpy as np
import torch
from torch import Tensor

from services.engine.batch import ForwardBatch
from services.engine.core.plan import Segment
from services.engine.gpu.packing import Packed, Packer


class StepInputs:
    """What make_batch of core/runner.py computes, for segments that may follow the step before."""

    def __init__(
        self,
        packer: Packer,
        segments: Sequence[Segment],
        page_size: int,
        rows_before: Mapping[int, int],
        pad_to: int = 0,
    ) -> None:
        """`rows_before`: which row of the step before chose a token, by sequence.

        `pad_to` rows more than there are repeat the first one: what they write into the pages is what it writes.
        """
        padded = [*segments, *[segments[0]] * (pad_to - len(segments))]
        lengths = [segment.num_tokens for segment in padded]
        starts = np.array(list(accumulate(lengths, initial=0)))  # (num_sequences + 1,)
        begins = np.array([segment.begin for segment in padded])
        num_tokens = int(starts[-1])
        known = chain.from_iterable([0] if segment.follows else segment.token_ids for segment in padded)
        rows = np.repeat(np.arange(len(padded)), lengths)  # (num_tokens,) which sequence a token is of
        positions = np.arange(num_tokens) - starts[rows] + begins[rows]
        tables = np.zeros((len(padded), max(len(segment.page_ids) for segment in padded)), dtype=np.int64)
        for table, segment in zip(tables, padded, strict=True):
            table[: len(segment.page_ids)] = np.frombuffer(segment.page_ids, dtype=np.int32)
        wanted = np.array([segment.sample is not None for segment in segments])
        self.num_tokens = num_tokens
        self._query_starts = torch.from_numpy(starts.astype(np.int32))
        self._contexts = torch.from_numpy((begins + lengths).astype(np.int32))
        self._follows = any(segment.follows for segment in segments)
        sources = [rows_before.get(segment.number, 0) if segment.follows else -1 for segment in padded]
        self._places = (
            packer.add(np.fromiter(known, dtype=np.int64, count=num_tokens)),
            packer.integers(positions),
            packer.integers(tables[rows, positions // page_size] * page_size + positions % page_size),
            packer.integers(begins + lengths),
            packer.add(tables),
            packer.integers(starts[1 : len(segments) + 1][wanted] - 1),
            packer.integers(sources),
            packer.integers(starts[:-1]),
        )

    def batch(self, packed: Packed, chosen_before: Tensor) -> ForwardBatch:
        """The batch on the device; chosen_before (rows,) int64 are the tokens of the step before."""
        tokens, positions, slots, contexts, tables, wanted, sources, first_rows = (
            packed[each] for each in self._places
        )
        if self._follows:
            carried = chosen_before[sources.clamp(min=0)]
            tokens[first_rows] = torch.where(sources >= 0, carried, tokens[first_rows])
        return ForwardBatch(
            token_ids=tokens,
            positions=positions,
            slots=slots,
            query_starts=self._query_starts,
            context_lengths=self._contexts,
            block_tables=tables.int(),
            logits_rows=wanted,
            contexts=contexts.int(),
        )
