"""Health, reflection, addresses and drain of a real server in this process."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from microserve.engine.v1 import engine_pb2, engine_pb2_grpc

from services.rpc import server_config
from services.rpc.bind import split_address
from services.rpc.channel import make_channel
from services.rpc.errors import PortInUse, StartError
from services.rpc.metrics import MetricsServer
from services.rpc.server import Server, ServerConfig, announce_ready
from tests.rpc.conftest import SERVICE, Serve

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


async def test_health_follows_set_serving_for_service_and_server(serve: Serve) -> None:
    running = await serve()
    health = health_pb2_grpc.HealthStub(running.channel)

    async def status(name: str) -> int:
        reply: health_pb2.HealthCheckResponse = await health.Check(health_pb2.HealthCheckRequest(service=name))
        return reply.status

    assert [await status(""), await status(SERVICE)] == [NOT_SERVING, NOT_SERVING]
    await running.server.set_serving(SERVICE, True)
    assert [await status(""), await status(SERVICE)] == [SERVING, SERVING]
    await running.server.set_serving(SERVICE, False)
    assert [await status(""), await status(SERVICE)] == [NOT_SERVING, NOT_SERVING]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await status("no.such.Service")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_port_in_use_and_foreign_address_are_named(serve: Serve) -> None:
    running = await serve()
    taken = running.server.bound
    with pytest.raises(PortInUse, match=f"{taken} is in use"):
        await Server(ServerConfig(listen=taken, metrics_port=None), "engine").start()
    # 203.0.113.0/24 is set aside for documentation: no machine has it.
    with pytest.raises(StartError, match=r"cannot listen on 203.0.113.1:4: Cannot assign"):
        await Server(ServerConfig(listen="203.0.113.1:4", metrics_port=None), "engine").start()


async def test_what_start_would_fail_of_can_be_asked_before(serve: Serve, tmp_path: Path) -> None:
    running = await serve(metrics_port=0)
    taken, metrics = running.server.bound, running.server.metrics_address
    assert metrics is not None
    with pytest.raises(PortInUse, match=f"{taken} is in use"):
        Server(ServerConfig(listen=taken), "engine").check()
    with pytest.raises(PortInUse, match=f"{metrics} is in use"):
        Server(ServerConfig(metrics_port=split_address(metrics)[1]), "engine").check()
    nowhere = tmp_path / "nowhere.pem"
    with pytest.raises(StartError, match="cannot read"):
        Server(ServerConfig(tls_cert=nowhere, tls_key=nowhere), "engine").check()
    Server(ServerConfig(listen=taken, reuse_port=True, metrics_port=None), "engine").check()


def test_calls_that_nobody_has_taken_yet_are_bounded_and_with_them_their_memory() -> None:
    """They come before any key is asked for."""
    options = dict(server_config.server_options(ServerConfig()))
    call_bytes = 82_500  # as measured with bodies of 60 kB
    for name in ("grpc.server.max_pending_requests", "grpc.server.max_pending_requests_hard_limit"):
        assert 4000 < options[name] <= (1 << 30) // call_bytes


@pytest.mark.slow
async def test_each_of_thousands_that_call_at_once_is_answered_by_the_service(serve: Serve) -> None:
    running = await serve()
    calls = [running.stub.GetInfo(engine_pb2.GetInfoRequest()) for _ in range(4000)]
    codes = Counter([await call.code() for call in calls])
    assert codes == {grpc.StatusCode.UNIMPLEMENTED: len(calls)}


@pytest.mark.slow
async def test_who_says_nothing_holds_no_descriptor_for_ever(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_config, "HANDSHAKE_TIMEOUT_MS", 50)
    running = await serve()
    reader, writer = await asyncio.open_connection(*split_address(running.server.bound))
    while await reader.read(4096):  # its settings, then the end
        pass
    writer.close()


@pytest.mark.slow
async def test_a_network_may_take_its_time_to_connect(serve: Serve) -> None:
    """One that gives every byte of the server's late; the call does not wait for a second attempt."""
    running = await serve()
    host, port = split_address(running.server.bound)

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float) -> None:
        while data := await reader.read(65536):
            await asyncio.sleep(delay_s)
            writer.write(data)
        writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(host, port)
        async with asyncio.TaskGroup() as group:
            group.create_task(pass_on(reader, back, 0.0))
            group.create_task(pass_on(there, writer, 0.3))

    async with await asyncio.start_server(connected, "127.0.0.1", 0) as far:
        channel = make_channel("{}:{}".format(*far.sockets[0].getsockname()))
        reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert reply.status == health_pb2.HealthCheckResponse.NOT_SERVING
        await channel.close()


async def test_failed_start_leaves_neither_port_taken(serve: Serve) -> None:
    running = await serve(metrics_port=0)
    taken = running.server.metrics_address
    assert taken is not None
    with pytest.raises(PortInUse, match=taken):
        await Server(ServerConfig(metrics_port=split_address(taken)[1]), "engine").start()
    second = Server(ServerConfig(listen=running.server.bound), "engine")
    with pytest.raises(PortInUse, match=running.server.bound):
        await second.start()
    assert second.metrics_address is not None
    MetricsServer(split_address(second.metrics_address)[1]).close()


@pytest.mark.parametrize(
    ("advertise", "expected"),
    [
        (None, "{bound}"),
        ("engine-0.svc", "engine-0.svc:{port}"),
        ("engine-0.svc:0", "engine-0.svc:{port}"),
        ("10.1.2.3:99", "10.1.2.3:99"),
    ],
)
async def test_advertised_address(serve: Serve, advertise: str | None, expected: str) -> None:
    running = await serve(advertise=advertise)
    bound = running.server.bound
    assert running.server.advertised == expected.format(bound=bound, port=bound.split(":")[1])


class Streaming(engine_pb2_grpc.EngineServiceServicer):
    """One stream that gives a token, and the rest when it is let go."""

    def __init__(self) -> None:
        self.go = asyncio.Event()

    async def StartGenerate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        yield engine_pb2.StartGenerateResponse(token_ids=[1])
        await self.go.wait()
        yield engine_pb2.StartGenerateResponse(token_ids=[2])


async def test_who_watches_a_name_that_no_service_has_is_told_and_a_long_one_refused(serve: Serve) -> None:
    """A watch lasts, shows no key, and what it names is kept."""
    health = health_pb2_grpc.HealthStub((await serve()).channel)
    unknown = health.Watch(health_pb2.HealthCheckRequest(service="n" * 256))
    assert (await unknown.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    unknown.cancel()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await health.Watch(health_pb2.HealthCheckRequest(service="n" * 257)).read()
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_drain_lets_a_stream_finish_and_takes_no_new_call(serve: Serve) -> None:
    servicer = Streaming()
    running = await serve(servicer)
    await running.server.set_serving(SERVICE, True)
    health = health_pb2_grpc.HealthStub(running.channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
    states = aiter(health)
    assert (await anext(states)).status == SERVING
    stream = aiter(running.stub.StartGenerate(engine_pb2.StartGenerateRequest()))
    assert (await anext(stream)).token_ids == [1]

    drained = asyncio.Event()

    async def on_drain() -> None:
        drained.set()

    serving = asyncio.create_task(running.server.run(on_drain))
    running.server.request_stop()
    assert (await anext(states)).status == NOT_SERVING
    health.cancel()
    await drained.wait()
    servicer.go.set()
    assert (await anext(stream)).token_ids == [2]
    async with asyncio.timeout(60):
        await serving
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.stub.GetInfo(engine_pb2.GetInfoRequest())
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_grace_bounds_a_stream_and_a_drain_that_never_end(serve: Serve) -> None:
    running = await serve(Streaming(), grace_s=0.05)
    stream = aiter(running.stub.StartGenerate(engine_pb2.StartGenerateRequest()))
    await anext(stream)
    running.server.request_stop()
    async with asyncio.timeout(60):
        await running.server.run(on_drain=asyncio.Event().wait)  # type: ignore[arg-type]
    with pytest.raises(grpc.aio.AioRpcError):
        await anext(stream)


def test_ready_line(capsys: pytest.CaptureFixture[str]) -> None:
    announce_ready("engine", "127.0.0.1:5", None)
    word, _, rest = capsys.readouterr().out.partition(" ")
    assert word == "READY"
    assert json.loads(rest) == {"service": "engine", "address": "127.0.0.1:5", "metrics": None}


async def test_a_health_watcher_does_not_hold_up_a_shutdown() -> None:
    server = Server(ServerConfig(grace_s=300), "watched")
    address = await server.start()
    await server.set_serving("some.Service", True)
    async with grpc.aio.insecure_channel(address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        async with asyncio.timeout(30):
            await server.stop(300)
        assert (await watch.read()).status == NOT_SERVING
        assert await watch.read() is grpc.aio.EOF
