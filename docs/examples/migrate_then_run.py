"""Move the prompt's cached context to the least loaded engine, then run there as if it had always been there."""


async def policy(request, fleet):
    source = max(fleet.engines, key=lambda engine: engine.cached_prefix(request))
    target = fleet.least_loaded(request)
    end = source.cached_prefix(request)
    if end > target.cached_prefix(request):
        async with target.prep_recv(request, end=end) as kv:
            await source.remote_send(request, kv)
            await kv.release(publish=True)
    yield target.start_generate(request)
