"""Requests to an HTTP server byte by byte, and applications that answer them."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from services.router.http import HttpServer
from tests.fakes import PATIENCE_S


async def fetch(address: str, head: str, *, tls: ssl.SSLContext | None = None) -> tuple[int, str]:
    """Status and body; 0 if the connection ended without an answer."""
    host, port = address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port), ssl=tls)
    writer.write(head.encode())
    try:
        answer = (await reader.read()).decode()
    except ConnectionError:
        answer = ""
    writer.close()
    return int(answer.split()[1]) if answer else 0, answer.partition("\r\n\r\n")[2]


async def get(address: str, path: str) -> tuple[int, str]:
    return await fetch(address, f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")


async def hello(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"hello"})


async def body_of(receive: Any) -> bytes:
    body, message = b"", {"more_body": True}
    while message.get("more_body"):
        message = await receive()
        body += message.get("body", b"")
    return body


async def echo(scope: Any, receive: Any, send: Any) -> None:
    body = await body_of(receive)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


async def what_comes(reader: asyncio.StreamReader) -> bytes:
    """Until the connection ends."""
    came = b""
    async with asyncio.timeout(PATIENCE_S):
        with suppress(ConnectionError):
            while piece := await reader.read(1 << 16):
                came += piece
    return came


@asynccontextmanager
async def connected(app: Any) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to a server of its own."""
    server = HttpServer(app, client_timeout_s=10)
    reader, writer = await asyncio.open_connection(*(await server.start("127.0.0.1:0")).split(":"))
    yield reader, writer
    writer.close()
    await server.close()
