"""One step: what a plan says is posted, launched and, when it is computed, settled."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from services.engine.core.api import WorkDone
from services.engine.core.context import Context
from services.engine.core.dispatch import Desks
from services.engine.core.plan import Computed, Launched, RunnerBroken, StepPlan
from services.engine.core.work import after_step
from services.engine.errors import StepFailed

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _UnderWay:
    plan: StepPlan
    launched: Launched
    since: float


class Stepper:
    """Carries plans out. A runner with a lag computes one step while the next is planned and launched."""

    def __init__(self, context: Context, desks: Desks, hand_over: Callable[[], None]) -> None:
        """`hand_over` gives away what came out of a step, where another is settled behind it."""
        self._context = context
        self._hand_over = hand_over
        self._generations = desks.generations
        self._sends = desks.sends
        self._under_way: deque[_UnderWay] = deque()
        self._settled_at = 0.0
        self.num_steps = 0
        self.work = WorkDone()

    @property
    def is_under_way(self) -> bool:
        """Whether a step is launched and not settled."""
        return bool(self._under_way)

    def carry_out(self, plan: StepPlan) -> bool:
        """Launches what the plan says, and settles all steps but those that may lag behind.

        False if computing failed: then its sequences have been answered, nothing of the step was published, and the
        others can go on. Raises RunnerBroken if nothing can.
        """
        for number in plan.preempted:
            self._generations.preempted(number)
        slots = self._sends.planned(plan)
        is_sound = not plan.segments or self._launch(plan, slots)
        self._context.pool.release(plan.pinned)
        # What is being sent may be in place before its step is settled, and then would not be published.
        num_lagging = self._context.runner.lag if plan.segments and not slots else 0
        while len(self._under_way) > num_lagging:
            is_sound &= self._settle_oldest()
            if len(self._under_way) > num_lagging:
                self._hand_over()  # what came out does not wait until the next one is computed
        return is_sound

    def abandon(self) -> None:
        """Waits until nothing computes any more; what comes out is nobody's."""
        while self._under_way:
            with suppress(RunnerBroken):
                self._wait(self._under_way.popleft())

    def _launch(self, plan: StepPlan, slots: list[int]) -> bool:
        since = self._context.clock()
        try:
            launched = self._context.runner.launch(plan, self._layer_raiser(slots))
        except RunnerBroken:
            raise
        except Exception:
            self._fail(plan)
            return False
        self._context.pool.begin_step()
        self._under_way.append(_UnderWay(plan, launched, since))
        return True

    def _settle_oldest(self) -> bool:
        step = self._under_way.popleft()
        computed = self._wait(step)
        self._context.pool.end_step()
        if computed is None:
            return False
        now = self._context.clock()
        seconds = now - max(step.since, self._settled_at)
        self._settled_at = now
        self.num_steps += 1
        self._context.pace.step(step.plan.num_tokens, seconds)
        self.work = after_step(self.work, step.plan, seconds)
        self._settle(step.plan, computed)
        return True

    def _wait(self, step: _UnderWay) -> Computed | None:
        """What the runner gave; None if it failed."""
        try:
            return step.launched.wait()
        except RunnerBroken:
            raise
        except Exception:
            self._fail(step.plan)
            return None

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
        """What came out for sequences that ended while the step was under way is dropped: their numbers name nobody."""
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
        _log.exception("a step failed", extra={"fields": {"sequences": len(plan.segments)}})
        error = StepFailed("The engine failed to compute a step.")
        for segment in plan.segments:
            if (generation := self._generations.get(segment.number)) is not None:
                self._generations.fail(generation, error)
            elif (send := self._sends.get(segment.number)) is not None:
                self._sends.fail(send, error)
