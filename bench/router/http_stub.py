"""python -m bench.router.http_stub: a worker that computes nothing behind the HTTP that other routers speak.

The first token of a streamed completion comes at once, each of the others a step later, as from bench/router/stub.py.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from contextlib import suppress

from services.rpc.server import announce_ready

MODELS = json.dumps({"object": "list", "data": [{"id": "stub", "object": "model", "max_model_len": 1 << 20}]}).encode()
PIECE = b'data: {"object":"text_completion","model":"stub","choices":[{"index":0,"text":"a"}]}\n\n'
LAST = b"data: [DONE]\n\n"


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, step_s: float) -> None:
    """One connection. Whoever speaks something else is cut off."""
    with suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.LimitOverrunError, ValueError):
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = head.partition(b"content-length:")[2].partition(b"\r\n")[0]
            body = await reader.readexactly(int(length or b"0"))
            if head.startswith(b"post /v1/completions"):
                await _complete(writer, json.loads(body)["max_tokens"], step_s)
            else:
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n")
                writer.write(b"content-length: %d\r\n\r\n%s" % (len(MODELS), MODELS))
    writer.close()


async def _complete(writer: asyncio.StreamWriter, num_tokens: int, step_s: float) -> None:
    loop = asyncio.get_running_loop()
    begin = loop.time()
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
    for number in range(num_tokens):
        if number:
            await asyncio.sleep(max(0.0, begin + number * step_s - loop.time()))
        writer.write(_chunk(PIECE))
        await writer.drain()
    writer.write(_chunk(LAST) + b"0\r\n\r\n")


async def _run(step_s: float) -> None:
    server = await asyncio.start_server(lambda reader, writer: serve(reader, writer, step_s), "127.0.0.1", 0)
    announce_ready("engine", f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
    await server.serve_forever()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--step-ms", type=float, default=0.0)
    parser.add_argument("--lifeline-fd", type=int, default=None)
    asyncio.run(_run(parser.parse_args().step_ms / 1e3))


if __name__ == "__main__":
    main()
