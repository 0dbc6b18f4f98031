"""Weighs every placement by what the fleet was measured to do, and takes the cheapest."""

from __future__ import annotations

from collections.abc import AsyncIterator

from services.router.policies import Chunk, Fleet, PolicyRequest


async def policy(request: PolicyRequest, fleet: Fleet) -> AsyncIterator[Chunk]:
    prefill, decode, split = await fleet.cheapest(request)
    if prefill is None:
        async for chunk in decode.start_generate(request):
            yield chunk
        return
    async with decode.prep_recv(request, end=split) as kv:
        await prefill.remote_send(request, kv)
        async for chunk in decode.start_generate(request, begin=split, kv=kv):
            yield chunk
