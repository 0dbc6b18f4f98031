"""The service as a process: what it shows, how it drains, and how engines live through its death."""

from __future__ import annotations

import asyncio
import os
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from microserve.kvtransfer.v1 import kvtransfer_pb2 as pb

from services.protocol.errors import ServiceError
from services.rpc.pool_client import PoolAttachError, adopt
from tests.kvtransfer.engine import FakeEngine
from tests.kvtransfer.oracle import expected
from tests.kvtransfer.pattern import pattern
from tests.kvtransfer.port import GrpcPort
from tests.kvtransfer.process import ServiceProcess
from tests.kvtransfer.streams import Watching

pytestmark = pytest.mark.slow

SERVICE = "microserve.kvtransfer.v1.KvTransferService"


@pytest.fixture
def start_service() -> Iterator[type[ServiceProcess]]:
    with ExitStack() as stack:

        class Tracked(ServiceProcess):
            def __init__(self, *argv: str) -> None:
                super().__init__(*argv)
                stack.callback(self.kill)

        yield Tracked


@asynccontextmanager
async def connected(service: ServiceProcess, *engines: str) -> AsyncIterator[tuple[GrpcPort, list[FakeEngine]]]:
    """A port, and attached engines with patterns 1, 2, ... in their pools."""
    async with AsyncExitStack() as stack:
        port = GrpcPort(service.address)
        stack.push_async_callback(port.close)
        started = []
        for seed, name in enumerate(engines, 1):
            engine = FakeEngine(port, name)
            stack.callback(engine.close)
            started.append(await engine.start(seed=seed))
        yield port, started


def pool_files(process_id: int) -> list[str]:
    """Names of the pools among the descriptors of a process."""
    links = [os.readlink(entry) for entry in Path(f"/proc/{process_id}/fd").iterdir()]
    return sorted(link for link in links if "microserve-pool-" in link)


async def test_a_pool_shows_once_in_proc(start_service: type[ServiceProcess]) -> None:
    service = start_service()
    async with connected(service, "engine-0", "engine-1"):
        assert pool_files(service.child.pid) == [
            "/memfd:microserve-pool-engine-0 (deleted)",
            "/memfd:microserve-pool-engine-1 (deleted)",
        ]
        assert "torch" not in await asyncio.to_thread(Path(f"/proc/{service.child.pid}/maps").read_text)


async def test_pools_without_an_engine_are_freed(start_service: type[ServiceProcess]) -> None:
    service = start_service("--pool-keep-s", "0")
    async with connected(service, "engine-0") as (port, (engine,)):
        engine.close()
        async with asyncio.timeout(20):
            while (await port.call("GetStats", pb.GetStatsRequest())).pools:
                pass
        assert pool_files(service.child.pid) == []
        with pytest.raises(ServiceError) as caught:
            await engine.invitation()
        assert caught.value.reason == "UNKNOWN_POOL"


async def test_the_limit_counts_all_pools(start_service: type[ServiceProcess]) -> None:
    service = start_service("--max-pool-bytes", "20000")
    async with connected(service, "engine-0") as (port, (engine,)):
        second = FakeEngine(port, "engine-1")
        with pytest.raises(ServiceError) as caught:
            await second.create()
        assert caught.value.reason == "NO_MEMORY"
        # Replacing one's own pool does not count twice.
        engine.close()
        await engine.create()


async def test_the_whole_server_serves(start_service: type[ServiceProcess]) -> None:
    async with connected(start_service()) as (port, _):
        whole = await health_pb2_grpc.HealthStub(port.channel).Check(health_pb2.HealthCheckRequest())
        assert whole.status == health_pb2.HealthCheckResponse.SERVING


async def test_drain(start_service: type[ServiceProcess]) -> None:
    """SIGTERM: NOT_SERVING, nothing new begins, what is under way finishes, exit code 0."""
    service = start_service()
    async with connected(service, "p", "d") as (port, (sender, receiver)):
        health = health_pb2_grpc.HealthStub(port.channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert (await health.read()).status == health_pb2.HealthCheckResponse.SERVING
        before = receiver.memory.copy()
        address = await receiver.grant("r", 0, 8, [4, 5])
        watch = Watching(receiver.watch())
        push = sender.push(sender.order(address, 0, 8, [1, 2], ready_slot=0))
        await push.opened()
        service.terminate()
        assert (await health.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        health.cancel()
        with pytest.raises(ServiceError) as caught:
            await sender.push(sender.order(address, 0, 4, [1])).done()
        assert caught.value.reason == "DRAINING"
        sender.pool.raise_ready(0, 3)
        assert (await push.done()).state == pb.PUSH_STATE_COMMITTED
        np.testing.assert_array_equal(receiver.memory, expected(before, receiver, sender, 0, 8, [1, 2], [4, 5]))
        # Its watcher heard of the commit before the stream ended.
        await watch.until(lambda events: len(events["r"].committed) == 1)
        await watch.close()
        code, errors = await asyncio.to_thread(service.end)
        assert code == 0
        assert "Traceback" not in errors
        assert address.secret.hex() not in errors
        assert sender.pool.service_is_gone()


async def test_engines_outlive_the_service(start_service: type[ServiceProcess]) -> None:
    """kill -9 of the service takes no page; its successor gets the descriptors back and goes on."""
    first = start_service()
    async with connected(first, "p", "d") as (_, (sender, receiver)):
        stale = await receiver.grant("r", 0, 8, [4, 5])
        first.kill()
        assert sender.pool.service_is_gone()
        np.testing.assert_array_equal(sender.memory, pattern(1, len(sender.memory)))
        second = start_service("--listen", first.address)
        async with connected(second) as (port, _):
            for engine in (sender, receiver):
                engine.port = port
                reply = await engine.create(adopt=True)
                assert reply.size_bytes == len(engine.memory)
                invitation = await engine.invitation()
                await asyncio.to_thread(adopt, engine.pool, invitation.socket_path, invitation.ticket)
            np.testing.assert_array_equal(sender.memory, pattern(1, len(sender.memory)))
            with pytest.raises(ServiceError) as caught:
                await sender.push(sender.order(stale, 0, 8, [1, 2])).done()
            assert caught.value.reason == "STALE_EPOCH"
            before = receiver.memory.copy()
            address = await receiver.grant("r", 0, 8, [4, 5])
            push = sender.push(sender.order(address, 0, 8, [1, 2], ready_slot=0))
            await push.opened()
            sender.pool.raise_ready(0, 3)
            await push.done()
            np.testing.assert_array_equal(receiver.memory, expected(before, receiver, sender, 0, 8, [1, 2], [4, 5]))
            # Handed back, it is a pool like any other.
            sender.close()
            successor = FakeEngine(port, "p")
            await successor.create()
            await successor.attach()
            np.testing.assert_array_equal(successor.memory, pattern(1, len(successor.memory)))
            successor.close()


async def test_a_ticket_from_a_dead_service(start_service: type[ServiceProcess]) -> None:
    service = start_service()
    async with connected(service, "p") as (port, (engine,)):
        other = FakeEngine(port, "q")
        await other.create(adopt=True)
        invitation = await other.invitation()
        service.kill()
        with pytest.raises(PoolAttachError):
            await asyncio.to_thread(adopt, engine.pool, invitation.socket_path, invitation.ticket)
        assert (engine.memory == pattern(1, len(engine.memory))).all()


async def test_metrics(start_service: type[ServiceProcess]) -> None:
    service = start_service()
    async with connected(service, "p", "d") as (_, (sender, receiver)):
        address = await receiver.grant("r", 0, 8, [4, 5])
        moved = (await sender.push(sender.order(address, 0, 8, [1, 2])).done()).bytes
        body = await asyncio.to_thread(_read, f"http://{service.metrics}/metrics")
    for line in (
        f'microserve_kvtransfer_bytes_total{{transport="shm"}} {float(moved)}',
        'microserve_kvtransfer_pushes_total{outcome="done",transport="shm"} 1.0',
        'microserve_kvtransfer_push_seconds_count{transport="shm"} 1.0',
        'microserve_kvtransfer_push_exposed_seconds_count{transport="shm"} 1.0',
        'microserve_kvtransfer_open_grants{engine="d"} 1.0',
        'microserve_kvtransfer_pool_bytes{attached="true",engine="p"} 12288.0',
        "microserve_kvtransfer_refused_writes_total 0.0",
    ):
        assert line in body


def _read(url: str) -> str:
    with urllib.request.urlopen(url) as response:
        text: str = response.read().decode()
    return text


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (("--copy-threads", "0"), "at least 1"),
        (("--push-stall-timeout-s", "0"), "more than 0"),
        (("--pool-keep-s", "-1"), "not negative"),
        (("--nonsense",), "--nonsense"),
    ],
)
def test_wrong_flags(argv: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(AssertionError) as caught:
        ServiceProcess(*argv)
    assert "(2," in str(caught.value)
    assert sentence in str(caught.value)
    assert "Traceback" not in str(caught.value)
