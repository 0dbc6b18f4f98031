"""Two engines compute the prompt; the one that has the first token goes on, the other stops. Who fails has lost."""

import asyncio


async def policy(request, fleet):
    engines = sorted(fleet.engines, key=lambda engine: engine.snapshot.sequences)[:2] or [fleet.least_loaded(request)]
    streams = [engine.start_generate(request) for engine in engines]
    reads = {asyncio.ensure_future(anext(stream)): stream for stream in streams}
    won, waiting = None, set(reads)
    while waiting and (won is None or won.exception()):
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        won = min(done, key=lambda read: read.exception() is not None)
    for read, stream in reads.items():
        if read is not won:
            read.cancel()
            await stream.aclose()
    yield won.result()
    yield reads[won]
