"""The runner of rank 0: whatever it computes, the other ranks compute with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from services.engine.core.plan import Launched, PageCopy, Runner, Segment, StepPlan
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
        ranks have added up that layer's attention: so a layer is told of when the next one is written."""
        self._ranks.tell(Compute(plan.copies, tuple(_without_history(segment) for segment in plan.segments)))
        if on_layer is None:
            return self._own.launch(plan, None)
        written = -1

        def next_layer(layer: int) -> None:
            nonlocal written
            if layer > 0:
                on_layer(layer - 1)
            written = layer

        computed = self._own.launch(plan, next_layer).wait()
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
