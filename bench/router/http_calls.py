"""Streamed completions over HTTP/1.1, read as cheaply as Python can: it is the server that is measured."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from bench.router.calls import Stream
from services.rpc.bind import split_address

_END = b"0\r\n\r\n"


class Connection:
    """One connection that is kept, for one request at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def read(self, num_tokens: int) -> Stream:
        """One completion. ConnectionError for an answer that is no stream of events."""
        body = json.dumps({"model": "stub", "prompt": "a b c d", "max_tokens": num_tokens, "stream": True}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
        begin = time.perf_counter()
        self._writer.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        received, first_s = b"", 0.0
        while not received.endswith(_END):
            data = await self._reader.read(1 << 16)
            received += data
            if not data or not received.startswith(b"HTTP/1.1 200"):
                raise ConnectionError(received[:500])
            if not first_s and b"data: " in received:
                first_s = time.perf_counter() - begin
        num_messages = received.count(b"data: ") - 1  # the last says [DONE]
        return Stream(first_s, time.perf_counter() - begin, num_messages, num_tokens)


@asynccontextmanager
async def connect(address: str) -> AsyncIterator[Connection]:
    """To host:port."""
    host, port = split_address(address)
    reader, writer = await asyncio.open_connection(host, port)
    try:
        yield Connection(reader, writer)
    finally:
        writer.close()


async def closed_loop(address: str, num_tokens: int, *, concurrency: int, num_requests: int) -> list[Stream]:
    """So many requests, so many at once, each client on a connection of its own."""
    streams: list[Stream] = []
    left = iter(range(num_requests))

    async def client() -> None:
        async with connect(address) as connection:
            streams.extend([await connection.read(num_tokens) for _ in left])

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(client())
    return streams
