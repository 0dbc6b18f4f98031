"""Running a planner, whatever it does: started, swapped and stopped while the router serves."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from pathlib import Path

from services.router.cleanup import Cleanup
from services.router.clock import now
from services.router.cost.book import CostBook
from services.router.fleet.homes import Homes
from services.router.fleet.registry import Registry
from services.router.fleet.reservation import CALL_TIMEOUT_S
from services.router.metrics import PLANNER_FAILURES, PLANNER_RUNNING
from services.router.planning.fleet import PlannerFleet
from services.router.planning.mover import Mover, MoveRecord
from services.router.planning.observer import Observer
from services.router.planning.topics import TopicLimits
from services.router.planning.traffic import Traffic
from services.router.planning.view import View
from services.router.programs.library import Library
from services.router.programs.program import BoundProgram
from services.router.programs.stack import ProgramInterrupted

log = logging.getLogger(__name__)

BUILT_IN = Path(__file__).parent.parent / "planners"
STOPPED = "it was stopped"


@dataclass(frozen=True, slots=True)
class PlannerLimits:
    """Seconds between looks, and that a planner may take for one, its moves included; moves at once; bytes a second on
    a link, on average; what counts as a topic."""

    interval_s: float = 2.0
    look_s: float = 60.0
    moves: int = 2
    bytes_per_s: float = 200e6
    after_cancel_s: float = 2.0
    topics: TopicLimits = field(default_factory=TopicLimits)


@dataclass(frozen=True, slots=True)
class PlannerStatus:
    """What the planner does, or did last."""

    spec: str = ""  # empty: there was none
    problem: str = "none was started"  # why it does not run; empty if it does
    now_s: float = 0.0  # on the clock of the moves
    age_s: float = 0.0  # since its start
    num_looks: int = 0
    views: tuple[View, ...] = ()  # of its last look
    moves: tuple[MoveRecord, ...] = ()  # the latest first
    outcomes: dict[str, int] = field(default_factory=dict)  # number of moves by code


class PlannerRun:
    """A planner on a task of its own, so that one that will not end can be left behind."""

    def __init__(
        self,
        program: BoundProgram,
        observer: Observer,
        mover: Mover,
        traffic: Traffic,
        homes: Homes,
        cleanup: Cleanup,
        limits: PlannerLimits,
    ) -> None:
        self.program = program
        self.observer, self.mover = observer, mover
        self.problem = ""
        self.began_s = now()
        self._traffic = traffic
        self._homes = homes
        self._limits = limits
        self.fleet = PlannerFleet(
            observer,
            mover,
            homes,
            cleanup,
            interval_s=limits.interval_s,
            look_s=limits.look_s,
            on_turn=self._turn,
        )
        self._alarm: asyncio.TimerHandle | None = None
        self._cutting: asyncio.Task[None] | None = None
        self._is_over = False
        PLANNER_RUNNING.set(1)
        traffic.begin()
        self._turn(True)
        self._task = asyncio.create_task(self._run(), name=f"planner {program.spec}")

    async def stop(self, problem: str = STOPPED) -> None:
        """Ends it and all that it left on engines; one that ignores its cancellation is left behind."""
        self.problem = self.problem or problem
        if not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task}, timeout=self._limits.after_cancel_s)
        await self._over()

    async def _run(self) -> None:
        try:
            await self.program.program.function(self.fleet, *self.program.arguments)
            problem = "it ended by itself"
        except asyncio.CancelledError:
            problem = "it cancelled itself"
        except ProgramInterrupted:
            problem = "it blocked the router and was interrupted"
        except BaseException as raised:  # also SystemExit: a planner must not end the router
            problem = f"it raised {type(raised).__name__}: {str(raised)[:200]}"
            log.error("planner failed", exc_info=raised, extra={"fields": {"planner": self.program.spec}})
        if not self.problem:
            self._failed(problem)
        await self._over()

    def _turn(self, has_turn: bool) -> None:
        """The planner may compute, or has asked for the next view."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        if has_turn and not self.problem:
            self._alarm = asyncio.get_running_loop().call_later(self._limits.look_s, self._cut)

    def _cut(self) -> None:
        self._failed(f"it did not ask for the next view within {self._limits.look_s:g} s")
        self._cutting = asyncio.create_task(self.stop(), name="cut planner")

    def _failed(self, problem: str) -> None:
        self.problem = problem
        PLANNER_FAILURES.labels(self.program.name).inc()
        log.error("planner is off", extra={"fields": {"planner": self.program.spec, "problem": problem}})

    async def _over(self) -> None:
        """Policies go back to what they see themselves. Only once: what was left behind may end under its successor."""
        if self._is_over:
            return
        self._is_over = True
        self._turn(False)
        self._traffic.end()
        self._homes.clear()
        PLANNER_RUNNING.set(0)
        await self.fleet.close()


class PlannerHost:
    """At most one planner at a time. It sees the requests that this router serves."""

    def __init__(
        self,
        registry: Registry,
        library: Library,
        traffic: Traffic,
        costs: CostBook,
        homes: Homes,
        limits: PlannerLimits,
    ) -> None:
        self.library = library
        self._registry = registry
        self._traffic = traffic
        self._costs = costs
        self._homes = homes
        self._limits = limits
        self._cleanup = Cleanup(CALL_TIMEOUT_S + 1.0)
        self._current: PlannerRun | None = None
        self._changing = asyncio.Lock()

    async def start(self, program: BoundProgram) -> None:
        """Begins a planner in place of the present one."""
        async with self._changing:
            await self._stop()
            limits = self._limits
            observer = Observer(self._registry, self._traffic, self._costs, self._homes, limits.topics)
            mover = Mover(self._registry, self._costs, moves=limits.moves, bytes_per_s=limits.bytes_per_s)
            self._current = PlannerRun(program, observer, mover, self._traffic, self._homes, self._cleanup, limits)
            log.info("planner started", extra={"fields": {"planner": program.spec}})

    async def stop(self) -> None:
        """Ends it, if there is one. Idempotent."""
        async with self._changing:
            await self._stop()

    async def close(self) -> None:
        """As stop, and waits for releases under way, bounded."""
        await self.stop()
        await self._cleanup.drain()

    def status(self) -> PlannerStatus:
        """As it is now."""
        run = self._current
        if run is None:
            return PlannerStatus()
        return PlannerStatus(
            spec=run.program.spec,
            problem=run.problem,
            now_s=now(),
            age_s=now() - run.began_s,
            num_looks=run.fleet.num_looks,
            views=run.observer.views,
            moves=tuple(reversed(run.mover.records)),
            outcomes=dict(run.mover.outcomes),
        )

    async def _stop(self) -> None:
        if self._current is not None:
            await self._current.stop()
