"""One engine computes the prompt and sends its KV; another computes the last prompt token and decodes."""

from __future__ import annotations

from collections.abc import AsyncIterator

from services.router.policies import Fleet, Generation, PolicyRequest


async def policy(request: PolicyRequest, fleet: Fleet) -> AsyncIterator[Generation]:
    prefill, decode = fleet.pair(request)
    end = len(request.prompt) - 1
    async with decode.prep_recv(request, end=end) as kv:
        await prefill.remote_send(request, kv)
        yield decode.start_generate(request, begin=end, kv=kv)
