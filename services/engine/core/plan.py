"""What one step computes, as plain data, and what came out."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from services.engine.sampling.params import SamplingParams
from services.engine.sampling.prompt_logprobs import PromptLogprobs


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """How to choose the token after the last one of a segment. `token_ids` is only read, and only during the step."""

    params: SamplingParams
    token_ids: Sequence[int]
    num_prompt_tokens: int
    forced_token_id: int | None = None
    allowed: NDArray[np.uint8] | None = None  # a bit a token id, see GuideState; None: any token


@dataclass(frozen=True, slots=True)
class ScoreSpec:
    """Tokens of a prompt to be rated by consecutive rows of a segment: row `first`, counted from the segment's begin,
    rates targets[0], which follows it."""

    first: int
    targets: Sequence[int]
    num_top: int  # alternatives to report with each


@dataclass(frozen=True, slots=True)
class Segment:
    """The next tokens of one sequence: positions [begin, end). page_ids cover [0, end)."""

    number: int  # of the sequence
    begin: int
    token_ids: Sequence[int]
    page_ids: array[int]
    sample: SampleSpec | None
    score: ScoreSpec | None = None

    @property
    def end(self) -> int:
        """First position after the segment."""
        return self.begin + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class PageCopy:
    """All layers of page `source` into `target`, before anything of the step is computed."""

    source: int
    target: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: copies first, then all segments as one batch. The rest names sequences whose standing changed."""

    segments: tuple[Segment, ...] = ()
    copies: tuple[PageCopy, ...] = ()
    pinned: tuple[int, ...] = ()  # pages retained until the copies are made
    admitted: tuple[int, ...] = ()
    preempted: tuple[int, ...] = ()  # they hold nothing now and will be computed again
    refused: tuple[int, ...] = ()  # sends that found too few pages; they hold nothing

    @property
    def num_tokens(self) -> int:
        """Tokens computed in the step."""
        return sum(len(segment.token_ids) for segment in self.segments)

    @property
    def changes_something(self) -> bool:
        """Whether another plan may find what this one did not."""
        return bool(self.segments or self.admitted or self.preempted or self.refused)


@dataclass(frozen=True, slots=True)
class Chosen:
    """A chosen token; log-probabilities are the model's own, None and empty unless asked for."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Computed:
    """What came out of a step: of each segment with a SampleSpec, and of each with a ScoreSpec, in order."""

    chosen: Sequence[Chosen] = ()
    scored: Sequence[PromptLogprobs] = ()


class Runner(Protocol):
    """The only place where tensors compute. Called on the loop thread; blocks until the step is computed."""

    def run(self, plan: StepPlan, on_layer: Callable[[int], None] | None) -> Computed:
        """Makes the plan's copies, computes its segments, chooses a token for each with a SampleSpec, and rates the
        tokens of each ScoreSpec.

        on_layer(l) is called once the KV of layer l of all segments is in the pages, readable by another process.
        """

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        """Copies whole pages, in order; done when it returns."""

    def poison(self, pages: Sequence[int]) -> None:
        """Fills free pages with NaN, done before the next step reads or another process writes them."""
