"""Two engines each compute and send a part of the prompt to a third."""

import asyncio

from services.router.policies import TokenRange


async def policy(request, fleet):
    first, second, decode = fleet.engines[:3]
    end = len(request.prompt) - 1
    async with decode.prep_recv(request, end=end) as kv:
        middle = max(kv.matched, decode.page_floor((kv.matched + end) / 2))
        await asyncio.gather(
            first.remote_send(request, kv, TokenRange(kv.matched, middle)),
            second.remote_send(request, kv, TokenRange(middle, end)),
        )
        yield decode.start_generate(request, begin=end, kv=kv)
