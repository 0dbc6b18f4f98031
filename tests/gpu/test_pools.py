"""On a real GPU: pools in its memory, copies within a service, and NCCL between two services that share it.

Apart from the service's other tests, which need a plugin of pytest that a Python with torch for a GPU may lack.
"""

# ruff: noqa: E402 - what is missing is found before it is imported.

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

for name in ("google.rpc", "grpc_health", "grpc_reflection", "prometheus_client", "xxhash"):
    pytest.importorskip(name)  # what a transfer service needs

from microserve.kvtransfer.v1 import kvtransfer_pb2 as pb

from services.rpc.cuda_driver import CudaDriver
from services.rpc.pool_client import attach_pool
from tests.kvtransfer import process
from tests.kvtransfer.engine import FakeEngine, Shape
from tests.kvtransfer.oracle import expected
from tests.kvtransfer.pattern import POISON, pattern
from tests.kvtransfer.port import GrpcPort
from tests.kvtransfer.process import ServiceProcess

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

SHAPE = Shape(layers=4, heads=2, head_dim=64, page_size=16, pages=64)


class _Bytes:
    """Device memory as torch takes it."""

    def __init__(self, address: int, size_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


class TorchEngine(FakeEngine):
    """An engine whose pool is memory of GPU 0, filled and read through torch."""

    async def start(self, *, seed: int | None = None) -> TorchEngine:
        torch.cuda.init()
        driver = CudaDriver(0)
        await self.create(gpu=driver.uuid)
        invitation = await self.invitation()
        self._pool = await asyncio.to_thread(attach_pool, invitation.socket_path, invitation.ticket, driver)
        assert self._pool.device is not None
        size_bytes = self._pool.device.size_bytes
        self.tensor = torch.as_tensor(_Bytes(self._pool.device.address, size_bytes), device="cuda:0")
        content = np.full(size_bytes, POISON, np.uint8) if seed is None else pattern(seed, size_bytes)
        self.tensor.copy_(torch.from_numpy(content))
        torch.cuda.synchronize()
        return self

    @property
    def memory(self) -> NDArray[np.uint8]:
        """A copy of what is in the pool now."""
        copied: NDArray[np.uint8] = self.tensor.cpu().numpy()
        return copied


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    """One for all tests: grpc.aio drops events when a call ends after its loop was closed."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture
def stack(loop: asyncio.Runner) -> Iterator[ExitStack]:
    """What a test opened, and closes in the reverse order."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def start(loop: asyncio.Runner, stack: ExitStack) -> Callable[..., TorchEngine]:
    """start(service, name, seed=...): an engine at a service."""

    def start(service: ServiceProcess, name: str, *, seed: int | None = None) -> TorchEngine:
        port = GrpcPort(service.address)
        stack.callback(lambda: loop.run(port.close()))
        engine = TorchEngine(port, name, SHAPE)
        stack.callback(engine.close)
        return loop.run(engine.start(seed=seed))

    return start


async def _move(sender: TorchEngine, receiver: TorchEngine, reservation: str) -> str:
    """Pushes layer by layer with partial pages at both ends, checks every byte, and returns the transport."""
    before = receiver.memory
    from_pages, to_pages = list(range(10, 31)), list(range(40, 61))
    address = await receiver.grant(reservation, 5, 330, to_pages)
    push = sender.push(sender.order(address, 5, 330, from_pages, ready_slot=0))
    for layers in range(1, SHAPE.layers + 1):
        sender.pool.raise_ready(0, layers)
        await push.layers(layers)
    last = await push.done()
    wanted = expected(before, receiver, sender, 5, 330, from_pages, to_pages)
    np.testing.assert_array_equal(receiver.memory, wanted)
    sender.pool.raise_ready(0, 0)
    transport: str = last.transport
    return transport


@pytest.mark.parametrize(
    ("options", "way"),
    [
        ((), "by the kernel"),
        (("--no-copy-kernel",), "run by run: --no-copy-kernel"),
        (("--checksums",), "by the kernel"),
    ],
    ids=["by_the_kernel", "run_by_run", "checksums"],
)
def test_cuda_ipc(
    loop: asyncio.Runner,
    stack: ExitStack,
    start: Callable[..., TorchEngine],
    options: tuple[str, ...],
    way: str,
) -> None:
    service = ServiceProcess("--cuda-device", "0", *options)
    stack.callback(service.kill)
    sender, receiver = start(service, "p", seed=1), start(service, "d")
    assert loop.run(_move(sender, receiver, "r")) == "cuda_ipc"
    stats = loop.run(sender.port.call("GetStats", pb.GetStatsRequest()))
    assert [each.note for each in stats.transports if each.name == "cuda_ipc"] == [way]


@pytest.mark.parametrize("options", [(), ("--checksums",)], ids=["plain", "checksums"])
@pytest.mark.parametrize("way", ["one_host", "two_hosts"])
def test_nccl(
    loop: asyncio.Runner,
    stack: ExitStack,
    start: Callable[..., TorchEngine],
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    options: tuple[str, ...],
) -> None:
    """Two ranks on one GPU: as NCCL 2.30 allows where it is told to, or as two hosts that talk over sockets."""
    services = []
    for node in ("near", "far"):
        if way == "one_host":
            monkeypatch.setitem(process.ENVIRONMENT, "NCCL_MULTI_RANK_GPU_ENABLE", "1")
        else:
            monkeypatch.setitem(process.ENVIRONMENT, "NCCL_HOSTID", node)
        monkeypatch.setitem(process.ENVIRONMENT, "NCCL_SOCKET_IFNAME", "lo")
        services.append(ServiceProcess("--cuda-device", "0", "--nccl-library", "auto", *options))
        stack.callback(services[-1].kill)
    sender, receiver = start(services[0], "p", seed=1), start(services[1], "d")
    # The second time over the same communicator.
    for reservation in ("r", "s"):
        assert loop.run(_move(sender, receiver, reservation)) == "nccl"
        loop.run(receiver.revoke(reservation))
