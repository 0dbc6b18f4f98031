"""The least loaded engine computes the whole request."""

from __future__ import annotations

from collections.abc import AsyncIterator

from services.router.policies import Fleet, Generation, PolicyRequest


async def policy(request: PolicyRequest, fleet: Fleet) -> AsyncIterator[Generation]:
    engine = fleet.least_loaded(request)
    yield engine.start_generate(request)
