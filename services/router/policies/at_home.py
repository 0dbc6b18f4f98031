"""Where a planner wants the request's topic to be at home, else on the least loaded engine."""

from __future__ import annotations

from collections.abc import AsyncIterator

from services.router.policies import Fleet, Generation, PolicyRequest


async def policy(request: PolicyRequest, fleet: Fleet) -> AsyncIterator[Generation]:
    engine = fleet.home(request) or fleet.least_loaded(request)
    yield engine.start_generate(request)
