"""Where programs meet the fleet."""

from __future__ import annotations

from functools import partial

from services.router.cleanup import Cleanup
from services.router.fleet.registry import Registry
from services.router.fleet.scope import RequestScope
from services.router.fleet.view import Fleet
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

    def run(self, program: BoundProgram, request: PolicyRequest) -> PolicyRun:
        """Begins the program; the caller must close the run."""
        scope = RequestScope(self._cleanup)
        fleet = Fleet(scope, self._registry.members.__getitem__, partial(self._registry.engines, request.model))
        return PolicyRun(program, self._catalogue.fallback, request, fleet, scope, self._limits)

    async def drain(self) -> None:
        """Waits for releases and cancels under way, bounded."""
        await self._cleanup.drain()
