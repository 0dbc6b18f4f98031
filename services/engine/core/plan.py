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
    """How to choose the token after the last one of a segment. `token_ids` is only read, and only during launch.

    `num_awaited` tokens more were chosen by the step before, which has not been settled.
    """

    params: SamplingParams
    token_ids: Sequence[int]
    num_prompt_tokens: int
    forced_token_id: int | None = None
    allowed: NDArray[np.uint8] | None = None  # a bit a token id, see GuideState; None: any token
    num_awaited: int = 0

    @property
    def position(self) -> int:
        """Absolute position of the token to choose."""
        return len(self.token_ids) + self.num_awaited

    @property
    def takes_largest(self) -> bool:
        """Whether the token of the model's largest logit is all that is wanted."""
        params, is_free = self.params, self.forced_token_id is None and self.allowed is None
        is_plain = params.is_greedy and params.logprobs is None
        return is_plain and is_free and not params.changes_logits(self.position - self.num_prompt_tokens)


@dataclass(frozen=True, slots=True)
class ScoreSpec:
    """Tokens of a prompt to be rated by consecutive rows of a segment: row `first`, counted from the segment's begin,
    rates targets[0], which follows it."""

    first: int
    targets: Sequence[int]
    num_top: int  # alternatives to report with each


@dataclass(frozen=True, slots=True)
class Segment:
    """The next tokens of one sequence: positions [begin, end). page_ids cover [0, end).

    One that `follows` has a single token, which the step before chose for the sequence and nobody knows yet. The last
    `num_single` tokens are computed one by one where that makes a difference: output, and the prompt's last one.
    """

    number: int  # of the sequence
    begin: int
    token_ids: Sequence[int]
    page_ids: array[int]
    sample: SampleSpec | None
    score: ScoreSpec | None = None
    follows: bool = False
    num_single: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens that are computed."""
        return 1 if self.follows else len(self.token_ids)

    @property
    def end(self) -> int:
        """First position after the segment."""
        return self.begin + self.num_tokens


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
    must_settle: bool = False  # nothing can be planned before the step under way is settled

    @property
    def num_tokens(self) -> int:
        """Tokens computed in the step."""
        return sum(segment.num_tokens for segment in self.segments)

    @property
    def changes_something(self) -> bool:
        """Whether another plan may find what this one did not."""
        return bool(self.segments or self.admitted or self.preempted or self.refused or self.must_settle)


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

    def wait(self) -> Computed:
        """See Launched: of a step that was over when launch returned."""
        return self


class RunnerBroken(Exception):
    """Nothing can be computed in this process any more."""


class Launched(Protocol):
    """A step that was given to a runner."""

    def wait(self) -> Computed:
        """Blocks until the step is computed. Raises what went wrong with it, or RunnerBroken."""


class Runner(Protocol):
    """The only place where tensors compute. Called on the loop thread; everything happens in the order of the calls."""

    @property
    def lag(self) -> int:
        """Steps, 0 or 1, that may be under way when the next is launched: with 1, its segments may follow them."""

    def launch(self, plan: StepPlan, on_layer: Callable[[int], None] | None) -> Launched:
        """Makes the plan's copies, computes its segments, chooses a token for each with a SampleSpec, and rates the
        tokens of each ScoreSpec.

        May return before that is done. on_layer(l) is called, during the call or a wait, once the KV of layer l of
        all segments is in the pages, readable by another process.
        """

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        """Copies whole pages, in order; done when it returns."""

    def poison(self, pages: Sequence[int]) -> None:
        """Fills free pages with NaN, done before the next step reads or another process writes them."""
