"""Adding up what steps did, so that others can learn how fast the engine is."""

from __future__ import annotations

from services.engine.core.api import WorkDone
from services.engine.core.plan import StepPlan


def after_step(before: WorkDone, plan: StepPlan, seconds: float) -> WorkDone:
    """`before` and one step more."""
    prompts = [(each.begin, each.num_tokens) for each in plan.segments if each.num_tokens > 1]
    rows = [each.begin for each in plan.segments if each.num_tokens == 1]
    return WorkDone(
        busy_s=before.busy_s + seconds,
        prompt_tokens=before.prompt_tokens + sum(tokens for _, tokens in prompts),
        prompt_context=before.prompt_context
        + sum(tokens * begin + tokens * (tokens - 1) // 2 for begin, tokens in prompts),
        rows=before.rows + len(rows),
        row_context=before.row_context + sum(rows),
    )
