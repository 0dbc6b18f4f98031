"""The runner of rank 0: whatever it computes, the other ranks compute with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from services.engine.core.plan import Launched, PageCopy, Runner, RunnerBroken, Segment, StepPlan
from services.engine.parallel.messages import Compute, CopyPages, Poison
from services.engine.parallel.ranks import Ranks


class ParallelRunner:
    """Tells the ranks what `own`, rank 0's runner, is about to do. No step lags: its tokens are known here alone."""

    lag = 0

    def __init__(self, own: Runner, ranks: Ranks) -> None:
        self._own = own
        self._ranks = ranks

    def launch(self, plan: StepPlan, on_layer: Callable[[int], None] | None) -> Launched:
        """See Runner. A layer is in the pages when every rank has written its heads, and that is certain once the
        ranks have added up that layer's attention: so a layer is told of when the next one is written. After the last
        one they add up only what logits are wanted of; where that is nothing, the others are waited for."""
        self._ranks.tell(Compute(plan.copies, tuple(_without_history(segment) for segment in plan.segments)))
        written = -1

        def next_layer(layer: int) -> None:
            nonlocal written
            if layer > 0 and on_layer is not None:
                on_layer(layer - 1)
            written = layer

        try:
            computed = self._own.launch(plan, next_layer).wait()
        except Exception as error:
            # The others are somewhere in this step; the next one would be added to it.
            raise RunnerBroken("a step of a replica of several ranks failed on rank 0") from error
        if all(segment.sample is None and segment.score is None for segment in plan.segments):
            self._ranks.ask(CopyPages(()))
        if on_layer is not None and written >= 0:
            on_layer(written)
        return computed

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        """See Runner."""
        self._ranks.ask(CopyPages(tuple(copies)))
        self._own.copy_pages(copies)

    def poison(self, pages: Sequence[int]) -> None:
        """See Runner."""
        self._ranks.ask(Poison(tuple(pages)))
        self._own.poison(pages)


def _without_history(segment: Segment) -> Segment:
    """Tokens are chosen on rank 0 alone; the others need not be sent what that takes."""
    if segment.sample is None:
        return segment
    return replace(segment, sample=replace(segment.sample, token_ids=(), allowed=None))
