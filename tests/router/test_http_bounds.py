"""What clients send that they should not, or slowly: bytes, times and requests are bounded, no body is a request."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from services.router import http
from services.router.http import HttpServer
from tests.fakes import PATIENCE_S
from tests.router.raw_http import connected, echo, fetch, hello, what_comes


async def test_a_head_that_does_not_come_ends_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_HEAD_TIMEOUT_S", 0.02)
    server = HttpServer(hello, client_timeout_s=10)
    address = await server.start("127.0.0.1:0")
    assert await fetch(address, "") == (0, "")
    assert await fetch(address, "GET / HTTP/1.1\r\nHo") == (0, "")
    # Also the second one of a connection.
    monkeypatch.setattr(http, "_HEAD_TIMEOUT_S", PATIENCE_S)
    reader, writer = await asyncio.open_connection(*address.split(":"))
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (await reader.readuntil(b"hello")).startswith(b"HTTP/1.1 200")
    monkeypatch.setattr(http, "_HEAD_TIMEOUT_S", 0.02)
    writer.write(b"GET / HT")
    assert await reader.read() == b""
    writer.close()
    await server.close()


async def test_the_rest_of_a_body_that_was_answered_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_REST_TIMEOUT_S", 0.02)
    server = HttpServer(hello, client_timeout_s=10)
    address = await server.start("127.0.0.1:0")
    async with asyncio.timeout(60):
        assert await fetch(address, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhalf") == (200, "hello")
        # One whose body is complete may ask again.
        head = "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nbody"
        status, rest = await fetch(address, head + head.replace("Host", "Connection: close\r\nHost"))
        assert (status, rest.count("hello")) == (200, 2)
    await server.close()


async def test_a_body_that_comes_slowly_is_waited_for_after_the_answer_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http, "_REST_TIMEOUT_S", 0)
    may_answer, is_half_here = asyncio.Event(), asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/first":
            await may_answer.wait()
        else:
            assert (await receive())["body"] == b"ha"
            is_half_here.set()
        await echo(scope, receive, send)

    async with connected(app) as (reader, writer):
        writer.write(
            b"GET /first HTTP/1.1\r\n\r\nPOST /second HTTP/1.1\r\nConnection: close\r\nContent-Length: 4\r\n\r\nha"
        )
        async with asyncio.timeout(PATIENCE_S):
            may_answer.set()
            await is_half_here.wait()
            writer.write(b"lf")
        came = await what_comes(reader)
        assert (came.count(b"HTTP/1.1 200"), came[-2:]) == (2, b"lf")


@pytest.mark.parametrize(("begin", "endless"), [(b"0\r\n", b"a:\r\n"), (b"0\r\na:", b"xxxx"), (b"5;", b"xxxx")])
async def test_trailers_and_lines_of_chunks_are_bounded(begin: bytes, endless: bytes) -> None:
    async with connected(echo) as (reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + begin + endless * 100_000)
        assert await what_comes(reader) == b""


async def test_any_number_of_small_chunks_is_taken() -> None:
    async with connected(echo) as (reader, writer):
        head = b"POST / HTTP/1.1\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        writer.write(head + b"1;a\r\nx\r\n" * 30_000 + b"0\r\n\r\n")
        assert (await what_comes(reader)).endswith(b"\r\n\r\n" + b"x" * 30_000)


async def test_trailers_are_no_headers() -> None:
    names: list[bytes] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await echo(scope, receive, send)
        names.extend(name for name, _ in scope["headers"])

    server = HttpServer(app, client_timeout_s=10)
    address = await server.start("127.0.0.1:0")
    head = "POST / HTTP/1.1\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert await fetch(address, head + "2\r\nhi\r\n0\r\nAuthorization: x\r\n\r\n") == (200, "hi")
    assert names == [b"connection", b"transfer-encoding"]
    await server.close()


@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize("connection", [b"Upgrade", b"Upgrade, close"])
async def test_a_body_after_an_offer_to_upgrade_is_no_request(is_chunked: bool, connection: bytes) -> None:
    """Though it comes after the head, and reads like one."""
    has_begun, paths = asyncio.Event(), []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        paths.append(scope["path"])
        has_begun.set()
        await echo(scope, receive, send)

    async with connected(app) as (reader, writer):
        inner = b"GET /inner HTTP/1.1\r\n\r\n"
        length = b"Transfer-Encoding: chunked" if is_chunked else b"Content-Length: %d" % len(inner)
        writer.write(b"POST / HTTP/1.1\r\nConnection: %b\r\nUpgrade: h2c\r\n%b\r\n\r\n" % (connection, length))
        async with asyncio.timeout(PATIENCE_S):
            await has_begun.wait()
            writer.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(inner), inner) if is_chunked else inner)
            assert (await reader.readuntil(inner)).startswith(b"HTTP/1.1 200")
        if connection == b"Upgrade":
            writer.write(b"GET /last HTTP/1.1\r\nConnection: close\r\n\r\n")
            assert (await what_comes(reader)).startswith(b"HTTP/1.1 200")
        assert await what_comes(reader) == b""
        assert paths == (["/", "/last"] if connection == b"Upgrade" else ["/"])


async def test_what_comes_with_an_offer_to_upgrade_is_read() -> None:
    async with connected(echo) as (reader, writer):
        offer = b"Connection: Upgrade\r\nUpgrade: h2c\r\n"
        writer.write(
            b"POST / HTTP/1.1\r\n" + offer + b"Content-Length: 5\r\n\r\nfirst"
            b"GET / HTTP/1.1\r\n" + offer + b"\r\n"
            b"POST / HTTP/1.1\r\nConnection: close\r\nContent-Length: 4\r\n\r\nlast"
        )
        came = await what_comes(reader)
        assert (came.count(b"HTTP/1.1 200"), came.count(b"first"), came[-4:]) == (3, 1, b"last")


async def test_a_connection_asks_for_few_things_at_once() -> None:
    may_answer, num_asked = asyncio.Event(), 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal num_asked
        num_asked += 1
        await may_answer.wait()
        await echo(scope, receive, send)

    server = HttpServer(app, client_timeout_s=10)
    address = await server.start("127.0.0.1:0")
    reader, writer = await asyncio.open_connection(*address.split(":"))
    writer.write(b"GET / HTTP/1.1\r\n\r\n" * 1000)
    assert await what_comes(reader) == b""
    assert num_asked <= 1
    writer.close()
    may_answer.set()
    reader, writer = await asyncio.open_connection(*address.split(":"))
    writer.write(b"GET / HTTP/1.1\r\n\r\n" * 8 + b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n")
    assert (await what_comes(reader)).count(b"HTTP/1.1 200") == 9
    writer.close()
    await server.close()


async def test_what_is_no_head_yet_keeps_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_KEEP_ALIVE_S", 0.1)
    async with connected(hello) as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        assert (await reader.readuntil(b"hello")).startswith(b"HTTP/1.1 200")
        writer.write(b"\r\n")
        assert await what_comes(reader) == b""


async def test_a_body_does_not_count_as_the_head_after_it() -> None:
    async with connected(echo) as (reader, writer):
        body = b"x" * 100_000
        writer.write(b"POST / HTTP/1.1\r\nContent-Length: 100000\r\n\r\n" + body + b"GET / HT")
        async with asyncio.timeout(PATIENCE_S):
            assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
            assert await reader.readexactly(len(body)) == body
        writer.write(b"TP/1.1\r\nConnection: close\r\n\r\n")
        assert b" 200 " in await what_comes(reader)
