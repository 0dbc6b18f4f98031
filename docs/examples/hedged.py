"""Two engines compute the prompt; the one that has the first token goes on, the other stops."""

import asyncio


async def policy(request, fleet):
    engines = sorted(fleet.engines, key=lambda engine: engine.snapshot.sequences)[:2]
    streams = [engine.start_generate(request) for engine in engines]
    reads = [asyncio.ensure_future(anext(stream)) for stream in streams]
    await asyncio.wait(reads, return_when=asyncio.FIRST_COMPLETED)
    won = next(i for i, read in enumerate(reads) if read.done())
    for i, stream in enumerate(streams):
        if i != won:
            reads[i].cancel()
            await stream.aclose()
    yield reads[won].result()
    yield streams[won]
