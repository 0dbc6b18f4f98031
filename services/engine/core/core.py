"""The engine's state machine: commands in; outputs, answers and requests to the transfer service out.

Single-threaded and without a clock of its own: EngineLoop drives it in production, tests drive it by hand.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import count

from services.engine.core import api
from services.engine.core.cache_watch import CacheWatch
from services.engine.core.calls import Calls
from services.engine.core.config import CoreConfig
from services.engine.core.context import Context
from services.engine.core.faults import FaultPoints, NoFaults
from services.engine.core.generations import Generations
from services.engine.core.pace import Pace
from services.engine.core.plan import Chosen, Runner, StepPlan
from services.engine.core.pool import PagePool
from services.engine.core.prep_recvs import PrepRecvs
from services.engine.core.reservations import Reservations
from services.engine.core.scheduler import Scheduler
from services.engine.core.sends import Sends
from services.engine.core.timers import Timers
from services.engine.core.transfer import TransferLink
from services.engine.errors import EngineStopped, StepFailed
from services.protocol.errors import ServiceError

_log = logging.getLogger(__name__)


class EngineCore:
    """Everything that the loop thread owns. `port` is None for an engine without a KV transfer service."""

    def __init__(
        self,
        config: CoreConfig,
        runner: Runner,
        listener: api.EngineListener,
        port: api.KvPort | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        faults: FaultPoints | None = None,
    ) -> None:
        pool = PagePool(config.num_pages, config.page_size, runner.poison if config.poison_pages else None)
        self._context = context = Context(
            config=config,
            clock=clock,
            runner=runner,
            pool=pool,
            scheduler=Scheduler(config, pool),
            timers=Timers(),
            link=TransferLink(port),
            calls=Calls(config.max_finished_requests),
            outputs=[],
            faults=faults or NoFaults(),
            pace=Pace(),
            arrivals=count(1),
        )
        self._listener = listener
        self._reservations = Reservations(context)
        self._prep_recvs = PrepRecvs(context, self._reservations)
        self._generations = Generations(context, self._reservations)
        self._sends = Sends(context)
        self._cache_watch = CacheWatch(pool)
        self._drains: list[api.Reply[None]] = []
        self._num_steps = 0
        self._last_load: api.Load | None = None

    def step(self, commands: Iterable[api.Command] = ()) -> bool:
        """Takes commands in, lets time pass, computes one step, and hands over what came out.

        Returns whether another step should follow at once; if not, nothing changes before the next command or
        next_timer(). Raises only if the state cannot be trusted any more; the caller then calls stop().
        """
        context = self._context
        context.faults.reach("step.begin")
        context.timers.run_due(context.clock())
        for command in commands:
            self._take(command)
        self._prep_recvs.step()
        plan = context.scheduler.plan(context.clock())
        self._compute(plan)
        self._hand_over()
        if context.config.check_every_step:
            self.check_invariants()
        context.faults.reach("step.end")
        return plan.changes_something

    def next_timer(self) -> float | None:
        """When, on the clock, step() is due even without a command; None if never."""
        return self._context.timers.next_due()

    def stop(self, error: ServiceError | None = None) -> None:
        """Answers everything that is open with UNAVAILABLE. The core must not be used afterwards."""
        error = error or EngineStopped("The engine has stopped.")
        self._context.outputs.clear()
        self._generations.fail_all(error)
        self._sends.fail_all(error)
        self._prep_recvs.fail_all(error)
        drains, self._drains = self._drains, []
        for reply in drains:
            reply(error)
        self._listener.on_outputs(tuple(self._context.outputs))

    def refuse(self, command: api.Command, error: ServiceError) -> None:
        """Answers a command with an error, at once; one that expects no answer is dropped. Any thread."""
        match command:
            case api.StartGenerate():
                self._listener.on_outputs((_refusal(command, error),))
            case (
                api.PrepRecv() | api.RemoteSend() | api.Release() | api.Renew() | api.Abort()
                | api.ListReservations() | api.Drain()
            ):  # fmt: skip
                command.reply(error)

    def load(self) -> api.Load:
        """The engine's load now."""
        scheduler = self._context.scheduler
        sequences = list(scheduler)
        return api.Load(
            running_sequences=scheduler.num_running,
            waiting_sequences=scheduler.num_waiting,
            waiting_for_kv=self._generations.num_waiting_for_kv,
            queued_tokens=sum(s.num_left for s in sequences if s.num_left > 1 or not s.pages),
            context_tokens=sum(s.num_computed for s in sequences),
            reservations=self._reservations.num_live,
            pages=self._context.pool.counts(),
            steps=self._num_steps,
            draining=self._context.draining,
        )

    def check_invariants(self) -> None:
        """Raises AssertionError unless every page is accounted for by its owners. O(pages), for tests and doubt."""
        users: Counter[int] = Counter()
        quarantined: set[int] = set()
        self._generations.count_users(users)
        self._sends.count_users(users)
        self._reservations.count_users(users, quarantined)
        self._context.pool.check(users, quarantined)
        for sequence in self._context.scheduler:
            known = self._generations.get(sequence.number) or self._sends.get(sequence.number)
            assert known is not None, "a sequence without a request"

    # --- commands ---------------------------------------------------------------------------------------------

    def _take(self, command: api.Command) -> None:
        try:
            self._dispatch(command)
        except ServiceError as error:
            if isinstance(command, api.StartGenerate):
                self._context.outputs.append(_refusal(command, error))
            else:
                self.refuse(command, error)
        except Exception:
            _log.exception("a command failed inside the engine", extra={"command": type(command).__name__})
            self.refuse(command, StepFailed("The engine failed to take the request in."))
            self.check_invariants()

    def _dispatch(self, command: api.Command) -> None:
        reservations, sends, faults = self._reservations, self._sends, self._context.faults
        match command:
            case api.StartGenerate():
                faults.reach("start_generate.begin")
                self._generations.start(command)
            case api.PrepRecv():
                faults.reach("prep_recv.begin")
                self._prep_recvs.prep_recv(command)
            case api.RemoteSend():
                faults.reach("remote_send.begin")
                sends.remote_send(command)
            case api.Cancel():
                if (call := self._context.calls.live(command.key)) is not None:
                    call.cancel()
            case api.Abort():
                if (call := self._context.calls.live(command.key)) is not None:
                    call.abort()
                command.reply(None)
            case api.Release():
                command.reply(reservations.release(command))
            case api.Renew():
                command.reply(reservations.renew(command))
            case api.ListReservations():
                command.reply(reservations.list(command))
            case api.GrantProgress():
                reservations.grant_progress(command)
            case api.GrantOpened():
                reservations.grant_opened(command)
            case api.GrantFailed():
                reservations.grant_failed(command)
            case api.GrantDrained():
                reservations.grant_drained(command)
            case api.PushEnded():
                sends.push_ended(command)
            case api.TransferServiceReady():
                self._context.link.ready(command)
            case api.TransferServiceLost():
                self._context.link.lost()
                self._prep_recvs.service_lost()
                reservations.service_lost()
                sends.service_lost()
            case api.WatchCache():
                self._cache_watch.watch(command.watcher_id, command.on_event)
            case api.UnwatchCache():
                self._cache_watch.unwatch(command.watcher_id)
            case api.Drain():
                self._context.draining = True
                self._drains.append(command.reply)

    # --- a step -----------------------------------------------------------------------------------------------

    def _compute(self, plan: StepPlan) -> None:
        for number in plan.preempted:
            self._generations.preempted(number)
        slots = self._sends.planned(plan)
        chosen = self._run(plan, slots)
        self._context.pool.release(plan.pinned)
        if chosen is not None:
            self._settle(plan, chosen)
        else:
            self.check_invariants()

    def _run(self, plan: StepPlan, slots: list[int]) -> list[Chosen] | None:
        """What the runner chose; None if it failed, and then the sequences of the step have been answered."""
        if not plan.segments:
            return []
        began = self._context.clock()
        try:
            chosen = list(self._context.runner.run(plan, self._layer_raiser(slots)))
        except Exception:
            _log.exception("a step failed", extra={"sequences": len(plan.segments)})
            self._fail_step(plan)
            return None
        self._num_steps += 1
        self._context.pace.step(plan.num_tokens, self._context.clock() - began)
        return chosen

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

    def _settle(self, plan: StepPlan, chosen: list[Chosen]) -> None:
        tokens = iter(chosen)
        for segment in plan.segments:
            token = next(tokens) if segment.sample else None
            if (generation := self._generations.get(segment.number)) is not None:
                self._context.scheduler.settle(generation.sequence, segment.end)
                self._generations.settle(generation, segment.begin, token)
            elif (send := self._sends.get(segment.number)) is not None:
                self._context.scheduler.settle(send.sequence, segment.end)
                self._sends.settle(send, segment.begin)

    def _fail_step(self, plan: StepPlan) -> None:
        """Answers whoever was in a step that raised. Nothing of it was published, so the others go on."""
        error = StepFailed("The engine failed to compute a step.")
        for segment in plan.segments:
            if (generation := self._generations.get(segment.number)) is not None:
                self._generations.fail(generation, error)
            elif (send := self._sends.get(segment.number)) is not None:
                self._sends.fail(send, error)

    def _hand_over(self) -> None:
        context = self._context
        self._cache_watch.flush()
        if context.outputs:
            outputs, context.outputs = tuple(context.outputs), []
            self._listener.on_outputs(outputs)
        if self._drains and not len(self._generations) and not len(self._sends):
            drains, self._drains = self._drains, []
            for reply in drains:
                reply(None)
        load = self.load()
        if load != self._last_load:
            self._last_load = load
            self._listener.on_load(load)


def _refusal(command: api.StartGenerate, error: ServiceError) -> api.SequenceOutput:
    return api.SequenceOutput(command.key, error=error, call_id=command.call_id)
