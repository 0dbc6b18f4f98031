"""Where programs meet the fleet."""

from __future__ import annotations

import asyncio
from functools import partial

from services.router.cleanup import Cleanup
from services.router.cost.book import CostBook
from services.router.fleet.homes import Homes
from services.router.fleet.recovery import Recovery
from services.router.fleet.registry import Registry
from services.router.fleet.scope import RequestScope
from services.router.fleet.view import Fleet
from services.router.planning.traffic import Traffic
from services.router.programs.catalogue import Catalogue
from services.router.programs.program import BoundProgram
from services.router.programs.runner import PolicyRun, RunLimits
from services.router.request import PolicyRequest


class PolicyHost:
    """Starts a run for each request."""

    def __init__(self, registry: Registry, catalogue: Catalogue, limits: RunLimits) -> None:
        self._registry = registry
        self._catalogue = catalogue
        self._limits = limits
        self._cleanup = Cleanup(limits.close_s)
        self.costs = CostBook()
        self.traffic, self.homes = Traffic(), Homes()  # what planners see, and what they say
        registry.on_report(self.costs.reported)
        self._runs: set[PolicyRun] = set()

    @property
    def num_running(self) -> int:
        """Programs that have not ended. After close(), those that ignore their cancellation."""
        return len(self._runs)

    def run(self, program: BoundProgram, request: PolicyRequest) -> PolicyRun:
        """Begins the program; the caller must close the run."""
        self.traffic.saw(request)
        scope = RequestScope(self._cleanup)
        engines = partial(self._registry.engines, request.model)
        roster = partial(self._registry.roster, request.model)
        fleet = Fleet(scope, self._registry.member, engines, roster, self.costs, self.homes)
        recovery = Recovery(request, scope, engines, self._limits.retries)
        run = PolicyRun(program, self._fallback, request, fleet, scope, recovery, self._limits, self._runs.discard)
        self._runs.add(run)
        return run

    def _fallback(self) -> BoundProgram:
        return self._catalogue.fallback

    async def close(self) -> None:
        """Ends every program, and waits for releases and cancels under way, bounded."""
        await asyncio.gather(*(run.close() for run in tuple(self._runs)))
        await self._cleanup.drain()
