"""One engine begins the answer, another goes on with it from the KV of the first."""

from contextlib import aclosing
from dataclasses import dataclass


@dataclass(frozen=True)
class Params:
    tokens: int = 4  # of the first engine


async def policy(request, fleet, params):
    first, second = fleet.pair(request)
    async with aclosing(first.start_generate(request)) as chunks:
        async for chunk in chunks:
            yield chunk
            if chunk.finish:
                return
            request = request.continued(chunk.token_ids)
            if request.num_generated >= params.tokens:
                break
    end = len(request.prompt) - 1
    async with second.prep_recv(request, end=end) as kv:
        await first.remote_send(request, kv)
        yield second.start_generate(request, begin=end, kv=kv)
