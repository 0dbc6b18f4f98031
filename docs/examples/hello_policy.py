async def policy(request, fleet):
    """Compute the prompt on one engine, generate on another."""
    prefill, decode = fleet.pair(request)
    end = len(request.prompt) - 1
    async with decode.prep_recv(request, end=end) as kv:
        await prefill.remote_send(request, kv)
        yield decode.start_generate(request, begin=end, kv=kv)
