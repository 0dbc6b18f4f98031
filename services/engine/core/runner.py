"""From a step's plan to tensors, through the model, to chosen tokens. Nothing else of the core imports torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from itertools import accumulate, chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.engine.attention.backend import AttentionBackend
from services.engine.attention.stored import fill_with_nan
from services.engine.batch import ForwardBatch, last_rows
from services.engine.core.plan import Chosen, Computed, Launched, PageCopy, Segment, StepPlan
from services.engine.model.model import Model
from services.engine.sampling.sampler import SamplingRow, sample
from services.engine.sampling.score import PromptScorer, rows_at_once


class TorchRunner:
    """Computes steps, one at a time, over one KV pool, (layers, pages, 2, kv_heads, page_size, head_dim).

    On a GPU, where writes are only queued when a layer is told of, it is for engines that send nothing.
    """

    lag = 0

    def __init__(
        self, model: Model, attention: AttentionBackend, kv: Tensor, eos_token_ids: Collection[int] = ()
    ) -> None:
        self._model = model
        self._attention = attention
        self._kv = kv
        self._eos_token_ids = tuple(eos_token_ids)

    def launch(self, plan: StepPlan, on_layer: Callable[[int], None] | None) -> Launched:
        """See Runner."""
        return self.run(plan, on_layer)

    @torch.inference_mode()
    def run(self, plan: StepPlan, on_layer: Callable[[int], None] | None) -> Computed:
        """A whole step."""
        wanted = [segment.score for segment in plan.segments if segment.score is not None]
        scorer = PromptScorer([each.targets for each in wanted], [each.num_top for each in wanted])
        hidden = self._compute(plan.copies, plan.segments, on_layer, scorer.rate)
        chosen = () if hidden is None else self._choose(plan.segments, hidden)
        self._wait()
        return Computed(chosen, scorer.results() if wanted else ())

    @torch.inference_mode()
    def compute(
        self,
        copies: Sequence[PageCopy],
        segments: Sequence[Segment],
        on_layer: Callable[[int], None] | None,
        rate: Callable[[Tensor], None],
    ) -> Tensor | None:
        """The step without its choices: logits, (rows, vocab), of the segments with a SampleSpec, None if none has.

        `rate` is given the logits of the rows of all ScoreSpecs, in order, as many at a time as memory is meant for.
        """
        hidden = self._compute(copies, segments, on_layer, rate)
        return None if hidden is None else self._model.logits(hidden)

    def _compute(
        self,
        copies: Sequence[PageCopy],
        segments: Sequence[Segment],
        on_layer: Callable[[int], None] | None,
        rate: Callable[[Tensor], None],
    ) -> Tensor | None:
        """The same, but for the head: hidden states, (rows, hidden), of the segments with a SampleSpec."""
        self._copy(copies)
        batch = make_batch(segments, self._kv.shape[4], self._model.device)
        hidden = self._model.forward(batch, self._attention, on_layer)  # (num_tokens, hidden)
        if any(segment.score for segment in segments):
            for rows in torch.split(scored_rows(segments), rows_at_once(self._model.config.vocab_size)):
                rate(self._model.logits(hidden[rows.to(hidden.device)]))
        num_wanted = batch.logits_rows.numel()
        if num_wanted == batch.num_tokens:
            return hidden
        return hidden[batch.logits_rows] if num_wanted else None

    def _choose(self, segments: Sequence[Segment], hidden: Tensor) -> list[Chosen]:
        """A token for each SampleSpec."""
        specs = [segment.sample for segment in segments if segment.sample is not None]
        if all(spec.takes_largest for spec in specs):
            return [Chosen(token) for token in self._model.largest(hidden).tolist()]
        rows = [
            SamplingRow(spec.params, spec.token_ids, spec.num_prompt_tokens, spec.forced_token_id, spec.allowed)
            for spec in specs
        ]
        sampled = sample(self._model.logits(hidden), rows, self._eos_token_ids)
        return [Chosen(token.token_id, token.logprob, token.top) for token in sampled]

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        """See Runner."""
        self._copy(copies)
        self._wait()

    @torch.inference_mode()
    def poison(self, pages: Sequence[int]) -> None:
        """See Runner."""
        fill_with_nan(self._kv, torch.as_tensor(list(pages), device=self._kv.device))
        self._wait()

    @torch.inference_mode()
    def _copy(self, copies: Sequence[PageCopy]) -> None:
        for copy in copies:
            self._kv[:, copy.target] = self._kv[:, copy.source]

    def _wait(self) -> None:
        if self._kv.device.type == "cuda":
            torch.cuda.current_stream(self._kv.device).synchronize()


def scored_rows(segments: Sequence[Segment]) -> Tensor:
    """(rows,) int64, which packed rows the ScoreSpecs ask for. A segment that follows has one, though no token yet."""
    starts = accumulate((segment.num_tokens for segment in segments), initial=0)
    wanted: list[int] = []
    for start, segment in zip(starts, segments, strict=False):
        if segment.score is not None:
            first = start + segment.score.first
            wanted.extend(range(first, first + len(segment.score.targets)))
    return torch.tensor(wanted, dtype=torch.int64)


def make_batch(segments: Sequence[Segment], page_size: int, device: torch.device) -> ForwardBatch:
    """Packs segments into tensors. No Python work per token or page but what list and array do themselves."""
    lengths = [len(segment.token_ids) for segment in segments]
    starts = np.array(list(accumulate(lengths, initial=0)))  # (num_sequences + 1,)
    begins = np.array([segment.begin for segment in segments])
    num_tokens = int(starts[-1])
    token_ids = np.fromiter(chain.from_iterable(s.token_ids for s in segments), dtype=np.int64, count=num_tokens)
    width = max(len(segment.page_ids) for segment in segments)
    filled = bytearray().join(segment.page_ids.tobytes().ljust(width * 4, b"\0") for segment in segments)
    tables = np.frombuffer(filled, dtype=np.int32).reshape(len(segments), width)
    if num_tokens == len(segments):
        # All decode. Indexing by arrays and masks would give the interpreter lock away, and the event loop keeps it for
        # a whole turn: felt in a small model's step.
        positions = begins
        slots = np.array([s.page_ids[s.begin // page_size] * page_size + s.begin % page_size for s in segments])
    else:
        rows = np.repeat(np.arange(len(segments)), lengths)  # (num_tokens,) which sequence a token is of
        positions = np.arange(num_tokens) - starts[rows] + begins[rows]
        slots = tables[rows, positions // page_size].astype(np.int64) * page_size + positions % page_size
    ends = accumulate(lengths)
    wanted = [end - 1 for end, segment in zip(ends, segments, strict=True) if segment.sample is not None]

    def placed(values: NDArray[Any]) -> Tensor:
        # Also a .to() that has nothing to do gives the interpreter lock away and has to get it back.
        tensor = torch.from_numpy(values)
        return tensor if device.type == "cpu" else tensor.to(device)

    batch = ForwardBatch(
        token_ids=placed(token_ids),
        positions=placed(positions),
        slots=placed(slots),
        query_starts=torch.from_numpy(starts.astype(np.int32)),
        context_lengths=torch.from_numpy((begins + lengths).astype(np.int32)),
        block_tables=placed(tables),
        logits_rows=placed(np.array(wanted, dtype=np.int64)),
    )
    if num_tokens == len(segments) and all(segment.num_single for segment in segments):
        return batch
    batch = replace(batch, single_rows=torch.tensor([segment.num_single for segment in segments], dtype=torch.int32))
    counts = np.array([s.num_tokens if s.score is not None else int(s.sample is not None) for s in segments])
    return replace(batch, last=last_rows(batch, counts))
