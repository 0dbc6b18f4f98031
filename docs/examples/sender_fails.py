"""Disaggregated; if the sender fails, the decoding engine computes the prompt itself."""

from services.router.policies import ServiceError


async def policy(request, fleet):
    prefill, decode = fleet.pair(request)
    end = len(request.prompt) - 1
    async with decode.prep_recv(request, end=end) as kv:
        try:
            await prefill.remote_send(request, kv)
        except ServiceError:
            kv, end = await kv.release(), 0
        yield decode.start_generate(request, begin=end, kv=kv)
