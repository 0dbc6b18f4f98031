"""The engine's state machine: commands in; outputs, answers and requests to the transfer service out.

Single-threaded and without a clock of its own: EngineLoop drives it in production, tests drive it by hand.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import count

from services.engine.core import api
from services.engine.core.calls import Calls
from services.engine.core.config import CoreConfig
from services.engine.core.context import Context
from services.engine.core.dispatch import Desks, refusal_of, refuse
from services.engine.core.faults import FaultPoints, NoFaults
from services.engine.core.guides import GuidePort
from services.engine.core.pace import Pace
from services.engine.core.plan import Runner
from services.engine.core.pool import PagePool
from services.engine.core.ports import EngineListener, KvPort
from services.engine.core.prefix_waits import PrefixWaits
from services.engine.core.scheduler import Scheduler
from services.engine.core.step import Stepper
from services.engine.core.timers import Timers
from services.engine.core.transfer import TransferLink
from services.engine.errors import EngineStopped
from services.protocol.errors import ServiceError


class EngineCore:
    """Everything that the loop thread owns. `port` is None for an engine without a KV transfer service."""

    def __init__(
        self,
        config: CoreConfig,
        runner: Runner,
        listener: EngineListener,
        port: KvPort | None = None,
        *,
        guides: GuidePort | None = None,
        clock: Callable[[], float] = time.monotonic,
        faults: FaultPoints | None = None,
    ) -> None:
        pool = PagePool(config.num_pages, config.page_size, runner.poison if config.poison_pages else None)
        timers, pace = Timers(), Pace()
        waits = PrefixWaits(config, pool, timers, pace)
        self._context = context = Context(
            config=config,
            clock=clock,
            runner=runner,
            pool=pool,
            waits=waits,
            scheduler=Scheduler(config, pool, waits),
            timers=timers,
            link=TransferLink(port),
            calls=Calls(config.max_finished_requests),
            outputs=[],
            faults=faults or NoFaults(),
            pace=pace,
            guides=guides,
            arrivals=count(1),
        )
        self._listener = listener
        self._desks = Desks(context)
        self._stepper = Stepper(context, self._desks, self._hand_over_results)
        self._last_load: api.Load | None = None

    def step(self, commands: Iterable[api.Command] = ()) -> bool:
        """Lets time pass, takes commands in, computes one step, and hands over what came out.

        Returns whether another step should follow at once; if not, nothing changes before the next command or
        next_timer(). Raises only if the state cannot be trusted any more; the caller then calls stop().
        """
        context, desks = self._context, self._desks
        context.faults.reach("step.begin")
        context.timers.run_due(context.clock())
        is_sound = True
        for command in commands:
            is_sound &= desks.take(command)
        plan = context.scheduler.plan(context.clock(), is_ahead=self._stepper.is_under_way)
        desks.prep_recvs.step()
        is_sound &= self._stepper.carry_out(plan)
        self._hand_over()
        if context.config.check_every_step or not is_sound:
            self.check_invariants()
        context.faults.reach("step.end")
        return self._stepper.is_under_way or (plan.changes_something and self._is_awaited())

    def next_timer(self) -> float | None:
        """When, on the clock, step() is due even without a command; None if never."""
        return self._context.timers.next_due()

    def stop(self) -> None:
        """Answers everything that is open with UNAVAILABLE. The core must not be used afterwards."""
        if self._context.guides is not None:
            self._context.guides.close()
        self._stepper.abandon()
        self._hand_over_outputs()
        self._desks.fail_all(EngineStopped("The engine has stopped."))
        self._hand_over_outputs()

    def refuse(self, command: api.Command, error: ServiceError) -> None:
        """Answers a command that will not be taken. Any thread."""
        if isinstance(command, api.StartGenerate):
            self._listener.on_outputs((refusal_of(command, error),))
        else:
            refuse(command, error)

    def load(self) -> api.Load:
        """The engine's load now."""
        scheduler, desks = self._context.scheduler, self._desks
        sequences = list(scheduler)
        return api.Load(
            running_sequences=scheduler.num_running,
            waiting_sequences=scheduler.num_waiting,
            waiting_for_kv=desks.generations.num_waiting_for_kv,
            queued_tokens=sum(s.num_left for s in sequences if s.num_left > 1 or not s.pages),
            context_tokens=sum(s.num_computed for s in sequences),
            reservations=desks.reservations.num_live,
            pages=self._context.pool.counts(),
            steps=self._stepper.num_steps,
            draining=self._context.draining,
            work=self._stepper.work,
        )

    def check_invariants(self) -> None:
        """Raises AssertionError unless every page is accounted for by its owners. O(pages), for tests and doubt."""
        users: Counter[int] = Counter()
        quarantined: set[int] = set()
        desks = self._desks
        desks.generations.count_users(users)
        desks.sends.count_users(users)
        desks.reservations.count_users(users, quarantined)
        self._context.pool.check(users, quarantined)
        for sequence in self._context.scheduler:
            known = desks.generations.get(sequence.number) or desks.sends.get(sequence.number)
            if known is None:
                raise AssertionError("a sequence without a request")

    def _is_awaited(self) -> bool:
        """Whether anybody waits for a step: otherwise one more would be in the way of handing on what this one gave."""
        scheduler = self._context.scheduler
        return bool(scheduler.num_running or scheduler.num_waiting or self._desks.prep_recvs.num_waiting)

    def _hand_over(self) -> None:
        self._hand_over_results()
        self._desks.answer_drains_if_done()
        load = self.load()
        if load != self._last_load:
            self._last_load = load
            self._listener.on_load(load)

    def _hand_over_results(self) -> None:
        """Of a step that is settled."""
        self._desks.cache_watch.flush()
        self._hand_over_outputs()

    def _hand_over_outputs(self) -> None:
        outputs, self._context.outputs = tuple(self._context.outputs), []
        if outputs:
            self._listener.on_outputs(outputs)
