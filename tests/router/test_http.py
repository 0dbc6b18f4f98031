"""/health and /metrics."""

from __future__ import annotations

import asyncio

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.router.http import HttpServer
from services.rpc.errors import PortInUse
from tests.router.harness import running


async def fetch(address: str, head: str) -> tuple[int, str]:
    host, port = address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(head.encode())
    answer = (await reader.read()).decode()
    writer.close()
    await writer.wait_closed()
    return int(answer.split()[1]) if answer else 0, answer.partition("\r\n\r\n")[2]


async def get(address: str, path: str) -> tuple[int, str]:
    return await fetch(address, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n")


async def test_health_follows_the_engines() -> None:
    async with running(1, http_listen="127.0.0.1:0") as suite:
        address = suite.router.addresses.http
        assert address is not None
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
        address = suite.router.addresses.http
        assert address is not None
        status, text = await get(address, "/metrics")
        assert status == 200
        for name in (
            'microserve_router_requests_total{code="OK",policy="data_parallel"}',
            'microserve_router_verb_seconds_count{code="OK",verb="start_generate"}',
            'microserve_router_ttft_seconds_count{policy="data_parallel"}',
            'microserve_router_engines{state="healthy"} 1.0',
            'microserve_router_tokens_total{kind="output"}',
        ):
            assert name in text
        assert await fetch(address, "HEAD /metrics HTTP/1.1\r\n\r\n") == (200, "")


async def test_other_requests_are_answered_or_dropped() -> None:
    async with running(1, http_listen="127.0.0.1:0") as suite:
        address = suite.router.addresses.http
        assert address is not None
        assert (await get(address, "/nope"))[0] == 404
        assert (await fetch(address, "POST /health HTTP/1.1\r\n\r\n"))[0] == 405
        assert (await fetch(address, "x" * 70_000 + "\r\n\r\n"))[0] == 0
        assert (await get(address, "/health"))[0] == 200


async def test_a_port_in_use_is_named() -> None:
    async with running(1, http_listen="127.0.0.1:0") as suite:
        assert suite.router.addresses.http is not None
        with pytest.raises(PortInUse, match=suite.router.addresses.http):
            await HttpServer(lambda: True).start(suite.router.addresses.http)
