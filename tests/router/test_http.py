"""The HTTP server: /health, /metrics, clients that leave, TLS, and how it ends."""

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

from services.router.http import CLIENT, Client, ClientGone, HttpServer
from services.rpc.bind import split_address
from services.rpc.errors import PortInUse, StartError
from services.rpc.tls import ServerTls
from tests.fakes import PATIENCE_S
from tests.limits import few_descriptors
from tests.router.harness import running
from tests.router.raw_http import fetch, get, hello


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
