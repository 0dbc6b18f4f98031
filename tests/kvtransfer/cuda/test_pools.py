"""Pools in the memory of a GPU: service and engines each have a fake driver of their own over the same memory."""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from microserve.kvtransfer.v1 import kvtransfer_pb2 as pb
from numpy.typing import NDArray

from services.kvtransfer.transports.cuda_ipc import gpu
from services.protocol.errors import Code, ServiceError
from services.protocol.ranges import TokenRange
from services.rpc.cuda_driver import CudaDriver
from services.rpc.errors import StartError
from services.rpc.pool_client import PoolAttachError, adopt, attach_pool
from tests.kvtransfer.cuda.fake_libcuda import UUID, FakeLibcuda
from tests.kvtransfer.engine import FakeEngine, Shape
from tests.kvtransfer.oracle import expected
from tests.kvtransfer.port import PATIENCE_S, DirectPort


class GpuEngine(FakeEngine):
    """An engine whose pool is device memory."""

    def __init__(self, port: DirectPort, name: str, shape: Shape | None = None) -> None:
        super().__init__(port, name, shape)
        self.driver = CudaDriver(0, FakeLibcuda())

    async def create(self, **fields: Any) -> Any:
        return await super().create(**{"gpu": self.driver.uuid, **fields})

    async def attach(self) -> None:
        invitation = await self.invitation()
        self._pool = await asyncio.to_thread(attach_pool, invitation.socket_path, invitation.ticket, self.driver)

    @property
    def memory(self) -> NDArray[np.uint8]:
        device = self.pool.device
        assert device is not None
        return np.ctypeslib.as_array((ctypes.c_uint8 * device.size_bytes).from_address(device.address))


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeLibcuda:
    """The services' driver."""
    library = FakeLibcuda()
    monkeypatch.setattr(gpu, "CudaDriver", lambda ordinal: CudaDriver(ordinal, library))
    return library


@pytest_asyncio.fixture(loop_scope="session")
async def port(library: FakeLibcuda, request: pytest.FixtureRequest) -> AsyncIterator[DirectPort]:
    port = DirectPort(cuda_device=0, drain_timeout_s=PATIENCE_S, **getattr(request, "param", {}))
    yield port
    await port.close()
    assert (library.mapped, library.handles) == (0, 0)


@pytest_asyncio.fixture(loop_scope="session")
async def pair(port: DirectPort) -> AsyncIterator[tuple[GpuEngine, GpuEngine]]:
    sender, receiver = GpuEngine(port, "p"), GpuEngine(port, "d")
    yield await sender.start(seed=1), await receiver.start()  # type: ignore[misc]
    sender.close()
    receiver.close()


CASES = {
    "whole_neighbours": (0, 16, [2, 3, 4, 5], [8, 9, 10, 11]),
    "scattered": (0, 16, [5, 1, 9, 0], [2, 15, 3, 8]),
    "partial_first_and_last": (3, 14, [6, 7, 8, 2], [1, 2, 3, 4]),
    "inside_one_page": (5, 7, [11], [12]),
}


# How pages are copied, and the call of the driver that copies them so.
WAYS = {"by_the_kernel": ({}, "cuLaunchKernel"), "run_by_run": ({"copy_kernel": False}, "cuMemcpyDtoDAsync_v2")}
BOTH_WAYS = pytest.mark.parametrize(("port", "call"), WAYS.values(), ids=WAYS, indirect=["port"])


@BOTH_WAYS
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
async def test_pages_arrive_layer_by_layer(
    pair: tuple[GpuEngine, GpuEngine], case: tuple[int, int, list[int], list[int]], library: FakeLibcuda, call: str
) -> None:
    library.log.clear()
    sender, receiver = pair
    begin, end, from_pages, to_pages = case
    before = receiver.memory.copy()
    address = await receiver.grant("r", begin, end, to_pages)
    push = sender.push(sender.order(address, begin, end, from_pages, ready_slot=0))
    for layers in range(1, 4):
        sender.pool.raise_ready(0, layers)
        await push.layers(layers)
        wanted = expected(before, receiver, sender, begin, end, from_pages, to_pages, layers=layers)
        np.testing.assert_array_equal(receiver.memory, wanted)
    assert (await push.done()).transport == "cuda_ipc"
    assert set(library.log) & {"cuLaunchKernel", "cuMemcpyDtoDAsync_v2"} == {call}


async def test_how_pages_are_copied_is_told(port: DirectPort) -> None:
    async def note(at: DirectPort) -> str:
        transports = (await at.call("GetStats", pb.GetStatsRequest())).transports
        return next(str(each.note) for each in transports if each.name == "cuda_ipc")

    assert await note(port) == "by the kernel"
    without = DirectPort(cuda_device=0, copy_kernel=False)
    assert await note(without) == "run by run: --no-copy-kernel"
    await without.close()


CHECKSUMS = pytest.mark.parametrize("port", [{"checksums": True}], indirect=True)


CHECKED_WAYS = [({**options, "checksums": True}, call) for options, call in WAYS.values()]
CHECKED_BOTH_WAYS = pytest.mark.parametrize(("port", "call"), CHECKED_WAYS, ids=WAYS, indirect=["port"])


@CHECKSUMS
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
async def test_checksums_of_what_arrived_whole(
    pair: tuple[GpuEngine, GpuEngine], case: tuple[int, int, list[int], list[int]]
) -> None:
    sender, receiver = pair
    begin, end, from_pages, to_pages = case
    before = receiver.memory.copy()
    address = await receiver.grant("r", begin, end, to_pages)
    assert (await sender.push(sender.order(address, begin, end, from_pages)).done()).state == pb.PUSH_STATE_COMMITTED
    wanted = expected(before, receiver, sender, begin, end, from_pages, to_pages)
    np.testing.assert_array_equal(receiver.memory, wanted)


@CHECKED_BOTH_WAYS
async def test_a_byte_that_arrives_otherwise_is_data_loss_and_fills_nothing(
    port: DirectPort, pair: tuple[GpuEngine, GpuEngine], library: FakeLibcuda, call: str
) -> None:
    sender, receiver = pair
    address = await receiver.grant("r", 0, 8, [4, 5])
    library.altered = True
    library.log.clear()  # the kernel's trial has launched it too
    with pytest.raises(ServiceError) as caught:
        await sender.push(sender.order(address, 0, 8, [1, 2])).done()
    assert (caught.value.code, caught.value.reason) == (Code.DATA_LOSS, "CHECKSUM_MISMATCH")
    library.altered = False
    assert call in library.log
    # The attempt did not count: the reservation is filled by the next one alone.
    (grant,) = port.service._gate.statuses(receiver.pool_id)
    assert grant.committed.ranges == ()
    again = await sender.push(sender.order(address, 0, 8, [1, 2], attempt=2)).done()
    assert again.state == pb.PUSH_STATE_COMMITTED
    (grant,) = port.service._gate.statuses(receiver.pool_id)
    assert grant.committed.ranges == (TokenRange(0, 8),)


@CHECKSUMS
async def test_memory_that_cannot_be_read_back_fails_the_push(
    pair: tuple[GpuEngine, GpuEngine], library: FakeLibcuda
) -> None:
    sender, receiver = pair
    address = await receiver.grant("r", 0, 8, [4, 5])
    library.failing["cuMemcpyDtoHAsync_v2"] = 700
    with pytest.raises(ServiceError, match="cuMemcpyDtoHAsync_v2: fake error 700") as caught:
        await sender.push(sender.order(address, 0, 8, [1, 2])).done()
    assert caught.value.reason == "DEVICE_FAILED"
    await receiver.revoke("r")


async def test_a_gpu_that_has_no_memory_for_the_service_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeLibcuda()
    library.failing["cuMemHostAlloc"] = 2
    monkeypatch.setattr(gpu, "CudaDriver", lambda ordinal: CudaDriver(ordinal, library))
    with pytest.raises(StartError, match=r"--cuda-device 0: cuMemHostAlloc: fake error 2"):
        DirectPort(cuda_device=0)


async def test_every_copy_is_checked(pair: tuple[GpuEngine, GpuEngine]) -> None:
    sender, receiver = pair
    address = await receiver.grant("r", 0, 8, [4, 5])
    push = sender.push(sender.order(address, 0, 8, [1, 2], ready_slot=0))
    sender.pool.raise_ready(0, 1)
    await push.layers(1)
    await receiver.revoke("r")
    settled = receiver.memory.copy()
    sender.pool.raise_ready(0, 3)
    with pytest.raises(ServiceError) as caught:
        await push.done()
    assert caught.value.reason == "RESERVATION_GONE"
    np.testing.assert_array_equal(receiver.memory, settled)


@BOTH_WAYS
async def test_a_revoke_waits_for_what_is_queued_and_nothing_comes_after_it(
    pair: tuple[GpuEngine, GpuEngine], library: FakeLibcuda, call: str
) -> None:
    sender, receiver = pair
    address = await receiver.grant("r", 0, 8, [4, 5])
    push = sender.push(sender.order(address, 0, 8, [1, 2], ready_slot=0))
    library.log.clear()
    library.waited_for.clear()
    library.may_end.clear()
    sender.pool.raise_ready(0, 1)
    assert await asyncio.to_thread(library.waited_for.wait, PATIENCE_S)
    assert call in library.log
    revoking = asyncio.create_task(receiver.revoke("r"))
    await asyncio.sleep(0)  # it fences before it waits
    assert not revoking.done()
    library.may_end.set()
    await asyncio.wait_for(revoking, PATIENCE_S)
    settled = receiver.memory.copy()
    library.log.clear()
    sender.pool.raise_ready(0, 3)
    with pytest.raises(ServiceError) as caught:
        await push.done()
    assert caught.value.reason == "RESERVATION_GONE"
    assert call not in library.log
    np.testing.assert_array_equal(receiver.memory, settled)


@BOTH_WAYS
async def test_a_copy_that_the_driver_refuses_fails_the_push(
    pair: tuple[GpuEngine, GpuEngine], library: FakeLibcuda, call: str
) -> None:
    sender, receiver = pair
    before = receiver.memory.copy()
    address = await receiver.grant("r", 0, 8, [4, 5])
    library.failing[call] = 700
    library.log.clear()
    with pytest.raises(ServiceError, match=f"{call}: fake error 700") as caught:
        await sender.push(sender.order(address, 0, 8, [1, 2])).done()
    assert caught.value.reason == "DEVICE_FAILED"
    # What was queued before it is waited for, or the grant would be drained too early.
    assert "cuStreamSynchronize" in library.log
    await receiver.revoke("r")
    np.testing.assert_array_equal(receiver.memory, before)


async def test_the_next_engine_takes_the_pool_and_the_next_service_takes_it_back(
    port: DirectPort, library: FakeLibcuda
) -> None:
    engine = await GpuEngine(port, "d").start(seed=3)
    held = engine.memory.copy()
    second = DirectPort(cuda_device=0)
    again = GpuEngine(second, "d")
    reply = await again.create(adopt=True)
    assert reply.pool_id != engine.pool_id
    invitation = await again.invitation()
    await asyncio.to_thread(adopt, engine.pool, invitation.socket_path, invitation.ticket)
    again._pool = engine.pool
    again.driver = engine.driver
    sender = await GpuEngine(second, "p").start(seed=4)
    address = await again.grant("r", 0, 4, [9])
    await sender.push(sender.order(address, 0, 4, [2])).done()
    np.testing.assert_array_equal(again.memory, expected(held, again, sender, 0, 4, [2], [9]))
    again.close()
    sender.close()
    await second.close()


async def test_a_gpu_that_the_service_was_not_started_for(port: DirectPort) -> None:
    for at, uuid in ((port, bytes(15) + b"x"), (DirectPort(), UUID)):
        engine = GpuEngine(at, "x")
        with pytest.raises(ServiceError) as caught:
            await engine.create(gpu=uuid)
        assert caught.value.reason == "NO_DEVICE"
        if at is not port:
            await at.close()


async def test_more_than_the_gpu_has(port: DirectPort) -> None:
    with pytest.raises(ServiceError) as caught:
        await GpuEngine(port, "x", Shape(pages=1 << 24)).create()
    assert caught.value.reason == "NO_MEMORY"


async def test_host_and_device_pools_do_not_mix(port: DirectPort, pair: tuple[GpuEngine, GpuEngine]) -> None:
    on_gpu, _ = pair
    in_host = await FakeEngine(port, "h").start(seed=2)
    for sender, receiver in ((on_gpu, in_host), (in_host, on_gpu)):
        address = await receiver.grant(f"to-{receiver.name}", 0, 4, [3])
        with pytest.raises(ServiceError) as caught:
            await sender.push(sender.order(address, 0, 4, [1])).done()
        assert caught.value.reason in ("NO_TRANSPORT", "TRANSPORT_FAILED")
    in_host.close()


async def test_an_engine_that_expects_other_memory_is_told(port: DirectPort) -> None:
    engine = GpuEngine(port, "x")
    await engine.create()
    invitation = await engine.invitation()
    with pytest.raises(PoolAttachError, match="other memory"):
        await asyncio.to_thread(attach_pool, invitation.socket_path, invitation.ticket)


async def test_a_service_without_a_driver_says_so_at_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeLibcuda()
    library.failing["cuInit"] = 100
    monkeypatch.setattr(gpu, "CudaDriver", lambda ordinal: CudaDriver(ordinal, library))
    with pytest.raises(StartError, match=r"--cuda-device 0: cuInit: fake error 100"):
        DirectPort(cuda_device=0)
