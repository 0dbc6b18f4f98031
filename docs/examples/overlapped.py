"""Disaggregated, with start_generate on its way while the KV still moves."""

import asyncio


async def policy(request, fleet):
    prefill, decode = fleet.pair(request)
    end = len(request.prompt) - 1
    async with decode.prep_recv(request, end=end) as kv, asyncio.TaskGroup() as group:
        group.create_task(prefill.remote_send(request, kv))
        yield decode.start_generate(request, begin=end, kv=kv)
