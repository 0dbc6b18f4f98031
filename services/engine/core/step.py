"""One step: what a plan says is posted, computed and settled."""

from __future__ import annotations

import logging
from collections.abc import Callable

from services.engine.core.api import WorkDone
from services.engine.core.context import Context
from services.engine.core.dispatch import Desks
from services.engine.core.plan import Computed, StepPlan
from services.engine.core.work import after_step
from services.engine.errors import StepFailed

_log = logging.getLogger(__name__)


class Stepper:
    """Carries plans out."""

    def __init__(self, context: Context, desks: Desks) -> None:
        self._context = context
        self._generations = desks.generations
        self._sends = desks.sends
        self.num_steps = 0
        self.work = WorkDone()

    def carry_out(self, plan: StepPlan) -> bool:
        """Computes what the plan says and settles it.

        False if computing failed: then its sequences have been answered, nothing of the step was published, and the
        others can go on.
        """
        for number in plan.preempted:
            self._generations.preempted(number)
        slots = self._sends.planned(plan)
        computed = self._run(plan, slots) if plan.segments else Computed()
        self._context.pool.release(plan.pinned)
        if computed is None:
            self._fail(plan)
            return False
        self._settle(plan, computed)
        return True

    def _run(self, plan: StepPlan, slots: list[int]) -> Computed | None:
        """What the runner gave; None if it failed."""
        began = self._context.clock()
        try:
            computed = self._context.runner.run(plan, self._layer_raiser(slots))
        except Exception:
            _log.exception("a step failed", extra={"fields": {"sequences": len(plan.segments)}})
            return None
        self.num_steps += 1
        seconds = self._context.clock() - began
        self._context.pace.step(plan.num_tokens, seconds)
        self.work = after_step(self.work, plan, seconds)
        return computed

    def _layer_raiser(self, slots: list[int]) -> Callable[[int], None] | None:
        """What tells the transfer service of layers that can be moved, while the step goes on."""
        if not slots:
            return None
        port, faults = self._context.link.port, self._context.faults

        def on_layer(layer: int) -> None:
            for slot in slots:
                port.raise_ready(slot, layer + 1)
            faults.reach(f"send.layer.{layer}")

        return on_layer

    def _settle(self, plan: StepPlan, computed: Computed) -> None:
        tokens, scored = iter(computed.chosen), iter(computed.scored)
        for segment in plan.segments:
            token = next(tokens) if segment.sample else None
            scores = next(scored) if segment.score else None
            if (generation := self._generations.get(segment.number)) is not None:
                self._context.scheduler.settle(generation.sequence, segment.end)
                self._generations.settle(generation, segment.begin, token, scores)
            elif (send := self._sends.get(segment.number)) is not None:
                self._context.scheduler.settle(send.sequence, segment.end)
                self._sends.settle(send, segment.begin)

    def _fail(self, plan: StepPlan) -> None:
        error = StepFailed("The engine failed to compute a step.")
        for segment in plan.segments:
            if (generation := self._generations.get(segment.number)) is not None:
                self._generations.fail(generation, error)
            elif (send := self._sends.get(segment.number)) is not None:
                self._sends.fail(send, error)
