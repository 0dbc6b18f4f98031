"""The HTTP server: /health, /metrics, what clients do wrong, and how it ends."""

from __future__ import annotations

import asyncio
import socket
import ssl
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.router import http
from services.router.http import CLIENT, Client, ClientGone, HttpServer
from services.rpc.bind import split_address
from services.rpc.errors import PortInUse, StartError
from services.rpc.tls import ServerTls
from tests.fakes import PATIENCE_S
from tests.limits import few_descriptors
from tests.router.harness import running


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


async def test_health_follows_the_engines() -> None:
    async with running(1, http_listen="127.0.0.1:0") as suite:
        address = suite.http
        assert await get(address, "/health") == (200, "SERVING\n")
        assert await get(address, "/health?x=1") == (200, "SERVING\n")
        health = health_pb2_grpc.HealthStub(suite.channels[0])
        for service in ("", "microserve.router.v1.RouterService", "microserve.router.v1.AdminService"):
            reply = await health.Check(health_pb2.HealthCheckRequest(service=service))
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        await suite.first.stop()
        await suite.until(lambda: not suite.router.serving)
        assert await get(address, "/health") == (503, "NOT_SERVING\n")
        suite.engines.clear()


async def test_metrics() -> None:
    async with running(1, http_listen="127.0.0.1:0") as suite:
        await suite.generate()
        await get(suite.http, "/v1/models")
        status, text = await get(suite.http, "/metrics")
        assert status == 200
        for name in (
            'microserve_router_requests_total{code="OK",model="fake",policy="data_parallel"}',
            'microserve_router_verb_seconds_count{code="OK",verb="start_generate"}',
            'microserve_router_ttft_seconds_count{model="fake",policy="data_parallel"}',
            'microserve_router_tpot_seconds_count{model="fake",policy="data_parallel"}',
            'microserve_router_engines{state="healthy"} 1.0',
            f'microserve_router_engine_failures_total{{address="{suite.first.address}"}} 0.0',
            'microserve_router_queued{priority="low"} 0.0',
            'microserve_router_tokens_total{kind="output"}',
            'microserve_router_http_requests_total{path="/v1/models",status="200"}',
        ):
            assert name in text
        assert await fetch(suite.http, "HEAD /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n") == (200, "")


async def test_other_requests_are_answered_or_dropped() -> None:
    async with running(1, http_listen="127.0.0.1:0") as suite:
        assert (await get(suite.http, "/nope"))[0] == 404
        assert (await fetch(suite.http, "POST /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"))[0] == 405
        assert (await fetch(suite.http, "nonsense\r\n\r\n"))[0] == 400
        assert (await fetch(suite.http, f"GET /{'x' * 70_000}"))[0] == 0
        assert (await get(suite.http, "/health"))[0] == 200


async def test_without_descriptors_it_pauses_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that cannot be taken stays ready to be taken: to try again at once would keep a core busy, and fill
    the disk with logs."""
    monkeypatch.setattr(asyncio.constants, "ACCEPT_RETRY_DELAY", 0.01)
    server = HttpServer(hello, client_timeout_s=10)
    address = await server.start("127.0.0.1:0")
    loop, failures, failed = asyncio.get_running_loop(), [], asyncio.Event()

    def note(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        failures.append(context["message"])
        failed.set()

    loop.set_exception_handler(note)
    with socket.socket() as client, few_descriptors():
        client.setblocking(False)
        await loop.sock_connect(client, split_address(address))
        await failed.wait()
        assert failures == ["socket.accept() out of system resource"]
    loop.set_exception_handler(None)
    assert await get(address, "/") == (200, "hello")
    await server.close()


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

    server = HttpServer(app, client_timeout_s=10)
    reader, writer = await asyncio.open_connection(*(await server.start("127.0.0.1:0")).split(":"))
    writer.write(
        b"GET /first HTTP/1.1\r\n\r\nPOST /second HTTP/1.1\r\nConnection: close\r\nContent-Length: 4\r\n\r\nha"
    )
    async with asyncio.timeout(PATIENCE_S):
        may_answer.set()
        await is_half_here.wait()
        writer.write(b"lf")
    came = await what_comes(reader)
    assert (came.count(b"HTTP/1.1 200"), came[-2:]) == (2, b"lf")
    writer.close()
    await server.close()


@pytest.mark.parametrize(("begin", "endless"), [(b"0\r\n", b"a:\r\n"), (b"0\r\na:", b"xxxx"), (b"5;", b"xxxx")])
async def test_trailers_and_lines_of_chunks_are_bounded(begin: bytes, endless: bytes) -> None:
    server = HttpServer(echo, client_timeout_s=10)
    reader, writer = await asyncio.open_connection(*(await server.start("127.0.0.1:0")).split(":"))
    writer.write(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + begin + endless * 100_000)
    assert await what_comes(reader) == b""
    writer.close()
    await server.close()


async def test_any_number_of_small_chunks_is_taken() -> None:
    server = HttpServer(echo, client_timeout_s=10)
    reader, writer = await asyncio.open_connection(*(await server.start("127.0.0.1:0")).split(":"))
    head = b"POST / HTTP/1.1\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    writer.write(head + b"1;a\r\nx\r\n" * 30_000 + b"0\r\n\r\n")
    assert (await what_comes(reader)).endswith(b"\r\n\r\n" + b"x" * 30_000)
    writer.close()
    await server.close()


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

    server = HttpServer(app, client_timeout_s=10)
    reader, writer = await asyncio.open_connection(*(await server.start("127.0.0.1:0")).split(":"))
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
    writer.close()
    await server.close()


async def test_what_comes_with_an_offer_to_upgrade_is_read() -> None:
    server = HttpServer(echo, client_timeout_s=10)
    reader, writer = await asyncio.open_connection(*(await server.start("127.0.0.1:0")).split(":"))
    offer = b"Connection: Upgrade\r\nUpgrade: h2c\r\n"
    writer.write(
        b"POST / HTTP/1.1\r\n" + offer + b"Content-Length: 5\r\n\r\nfirst"
        b"GET / HTTP/1.1\r\n" + offer + b"\r\n"
        b"POST / HTTP/1.1\r\nConnection: close\r\nContent-Length: 4\r\n\r\nlast"
    )
    came = await what_comes(reader)
    assert (came.count(b"HTTP/1.1 200"), came.count(b"first"), came[-4:]) == (3, 1, b"last")
    writer.close()
    await server.close()


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
    server = HttpServer(hello, client_timeout_s=10)
    reader, writer = await asyncio.open_connection(*(await server.start("127.0.0.1:0")).split(":"))
    writer.write(b"GET / HTTP/1.1\r\n\r\n")
    assert (await reader.readuntil(b"hello")).startswith(b"HTTP/1.1 200")
    writer.write(b"\r\n")
    assert await what_comes(reader) == b""
    writer.close()
    await server.close()


async def test_a_body_does_not_count_as_the_head_after_it() -> None:
    server = HttpServer(echo, client_timeout_s=10)
    reader, writer = await asyncio.open_connection(*(await server.start("127.0.0.1:0")).split(":"))
    body = b"x" * 100_000
    writer.write(b"POST / HTTP/1.1\r\nContent-Length: 100000\r\n\r\n" + body + b"GET / HT")
    async with asyncio.timeout(PATIENCE_S):
        assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
        assert await reader.readexactly(len(body)) == body
    writer.write(b"TP/1.1\r\nConnection: close\r\n\r\n")
    assert b" 200 " in await what_comes(reader)
    writer.close()
    await server.close()


async def test_what_a_client_does_not_take_is_given_up_by_the_kernel() -> None:
    given_up = asyncio.Event()

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

        async def pour() -> None:
            while True:
                await send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": True})
                await asyncio.sleep(0)

        pouring = asyncio.create_task(pour())
        while (await receive())["type"] != "http.disconnect":
            pass
        pouring.cancel()
        given_up.set()

    server = HttpServer(endless, client_timeout_s=0.1)
    host, port = (await server.start("127.0.0.1:0")).split(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        async with asyncio.timeout(60):
            await given_up.wait()
    await server.close()


async def test_a_client_that_leaves_ends_what_it_asked_for() -> None:
    """Also one that has asked for something else meanwhile."""
    begun, ended = asyncio.Event(), asyncio.Event()

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        begun.set()
        with pytest.raises(ClientGone):
            await scope["state"][CLIENT].stays_for(asyncio.Event().wait())
        ended.set()

    server = HttpServer(endless, client_timeout_s=10)
    address = await server.start("127.0.0.1:0")
    for num_requests in (1, 2):
        begun.clear()
        ended.clear()
        _, writer = await asyncio.open_connection(*address.split(":"))
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * num_requests)
        async with asyncio.timeout(PATIENCE_S):
            await begun.wait()
            writer.close()
            await ended.wait()
    await server.close()


async def test_who_is_cancelled_from_elsewhere_has_not_lost_its_client() -> None:
    client = Client()
    work = asyncio.create_task(client.stays_for(asyncio.Event().wait()))
    await asyncio.sleep(0)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    await client.stays_for(asyncio.sleep(0))
    client.leave()  # nobody works for it any more
    with pytest.raises(ClientGone):
        await client.stays_for(asyncio.sleep(0))


async def test_close_cuts_off_what_is_under_way() -> None:
    begun, cancelled = asyncio.Event(), asyncio.Event()

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    server = HttpServer(endless, client_timeout_s=10)
    address = await server.start("127.0.0.1:0")
    asking = asyncio.create_task(get(address, "/"))
    await begun.wait()
    await server.close()
    assert cancelled.is_set()
    assert (await asking)[0] in (0, 500)
    await server.close()


async def test_tls(tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    server = HttpServer(hello, client_timeout_s=10, tls=ServerTls(tmp_path / "cert.pem", tmp_path / "key.pem"))
    address = await server.start("127.0.0.1:0")
    context = ssl.create_default_context()
    authority.configure_trust(context)
    assert await fetch(address, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", tls=context) == (200, "hello")
    await server.close()
    absent = HttpServer(hello, client_timeout_s=10, tls=ServerTls(tmp_path / "none.pem", tmp_path / "key.pem"))
    with pytest.raises(StartError, match=r"cannot read .*none\.pem"):
        await absent.start("127.0.0.1:0")


async def test_a_replaced_certificate_is_used_without_a_restart(tmp_path: Path) -> None:
    """Roots of clients too."""
    request = "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    names = [tmp_path / name for name in ("cert.pem", "key.pem", "ca.pem")]

    def install() -> ssl.SSLContext:
        """Writes files of a new authority; returns what a client of it uses."""
        authority = trustme.CA()
        certificate = authority.issue_cert("127.0.0.1")
        pems = (certificate.cert_chain_pems[0], certificate.private_key_pem, authority.cert_pem)
        for path, pem in zip(names, pems, strict=True):
            pem.write_to_path(str(path))
        context = ssl.create_default_context(cafile=names[2])
        context.load_cert_chain(names[0], names[1])
        return context

    before = install()
    server = HttpServer(hello, client_timeout_s=10, tls=ServerTls(*names))
    address = await server.start("127.0.0.1:0")
    assert await fetch(address, request, tls=before) == (200, "hello")
    after = install()
    assert await fetch(address, request, tls=after) == (200, "hello")
    with pytest.raises(ssl.SSLError):
        await fetch(address, request, tls=before)
    before.load_verify_locations(names[2])  # it trusts the server now, which does not trust it
    with suppress(ssl.SSLError):  # or the connection ends
        assert await fetch(address, request, tls=before) == (0, "")
    await server.close()


async def test_a_port_in_use_is_named() -> None:
    first = HttpServer(hello, client_timeout_s=10)
    address = await first.start("127.0.0.1:0")
    with pytest.raises(PortInUse, match=address):
        await HttpServer(hello, client_timeout_s=10).start(address)
    await first.close()
