"""Weighs every placement by what the fleet was measured to do, and takes the cheapest."""

from __future__ import annotations

from collections.abc import AsyncIterator

from services.router.policies import Fleet, Generation, PolicyRequest


async def policy(request: PolicyRequest, fleet: Fleet) -> AsyncIterator[Generation]:
    prefill, decode, split = await fleet.cheapest(request)
    if prefill is None:
        yield decode.start_generate(request)
        return
    async with decode.prep_recv(request, end=split) as kv:
        await prefill.remote_send(request, kv)
        yield decode.start_generate(request, begin=split, kv=kv)
