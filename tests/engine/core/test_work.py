"""What steps did, added up and told."""

from __future__ import annotations

from array import array

from services.engine.core.api import Load, WorkDone
from services.engine.core.plan import Segment, StepPlan
from services.engine.core.work import after_step
from services.engine.front.replies import to_load
from services.protocol.pages import PageCounts


def test_prompts_and_rows_are_told_apart() -> None:
    def segment(begin: int, tokens: int) -> Segment:
        return Segment(1, begin, [0] * tokens, array("i"), None)

    plan = StepPlan(segments=(segment(0, 4), segment(16, 2), segment(50, 1), segment(60, 1)))
    work = after_step(WorkDone(1.0, 10, 20, 30, 40), plan, 0.5)
    context = (0 + 1 + 2 + 3) + (16 + 17)
    assert work == WorkDone(1.5, 10 + 6, 20 + context, 30 + 2, 40 + 110)


def test_it_is_told_with_the_load() -> None:
    load = Load(0, 0, 0, 0, 0, 0, PageCounts(1, 0, 0, 0, 1), 7, False, WorkDone(1.5, 2, 3, 4, 5))
    told = to_load(load)
    work = told.work
    assert told.step_count == 7
    assert work.busy.ToMilliseconds() == 1500
    assert (work.prompt_token_count, work.prompt_context_token_count) == (2, 3)
    assert (work.row_count, work.row_context_token_count) == (4, 5)
