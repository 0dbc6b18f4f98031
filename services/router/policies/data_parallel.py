"""The least loaded engine computes the whole request."""

from __future__ import annotations

from collections.abc import AsyncIterator

from services.router.policies import Chunk, Fleet, PolicyRequest


async def policy(request: PolicyRequest, fleet: Fleet) -> AsyncIterator[Chunk]:
    engine = fleet.least_loaded(request)
    async for chunk in engine.start_generate(request):
        yield chunk
