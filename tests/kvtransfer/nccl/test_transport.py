"""Pushes over NCCL between two services of this process. Only the library and the GPU are fakes; time is real, because
nothing here waits for a deadline but where a test says so."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import numpy as np
import pytest
import pytest_asyncio
from microserve.kvtransfer.v1 import kvtransfer_pb2 as pb

from services.kvtransfer.convert import to_address
from services.kvtransfer.errors import PeerLost, TransportFailed
from services.kvtransfer.landing import Claim, Landings
from services.kvtransfer.pool import Pool
from services.kvtransfer.transports.base import Peer, PutRequest
from services.kvtransfer.transports.cuda_ipc.copies import RunCopier
from services.kvtransfer.transports.cuda_ipc.staging import Staging
from services.kvtransfer.transports.nccl import buffers as buffers_module
from services.kvtransfer.transports.nccl import communicator
from services.kvtransfer.transports.nccl import source as source_module
from services.kvtransfer.transports.nccl.buffers import Buffer, Buffers
from services.kvtransfer.transports.nccl.communicator import Communicator, Patience
from services.kvtransfer.transports.nccl.library import MAX_BLOCKS
from services.kvtransfer.transports.nccl.link import Link
from services.kvtransfer.transports.nccl.sink import NcclSink
from services.kvtransfer.transports.nccl.source import NcclSource
from services.kvtransfer.transports.pull.fetching import Extent
from services.kvtransfer.transports.pull.lane import PullLane, PullTransport
from services.kvtransfer.transports.pull.session import Answer, PullOpen, PullSessions, Said
from services.protocol.address import KvAddress
from services.protocol.errors import Code, ReservationGone, ServiceError
from services.protocol.ranges import TokenRange
from tests.kvtransfer.cuda.fake_device import FakeDevice
from tests.kvtransfer.engine import FakeEngine
from tests.kvtransfer.nccl.fake_nccl import FakeNccl
from tests.kvtransfer.oracle import expected
from tests.kvtransfer.port import PATIENCE_S, DirectPort
from tests.kvtransfer.streams import Watching

PAGES, TARGET = [1, 2], [4, 5]
BUFFER_BYTES = 1 << 16


class Caller:
    """A PullCaller that hands a stream to the receiver's sessions without a wire."""

    def __init__(self, sessions: PullSessions) -> None:
        self._sessions = sessions

    async def pull(self, endpoint: str, opening: PullOpen, said: AsyncIterator[Said]) -> AsyncGenerator[Answer, None]:
        stream = self._sessions.serve(opening, said)
        try:
            async for answer in stream:
                yield answer
        finally:
            await stream.aclose()

    async def end(self, endpoint: str, address: KvAddress, claim: Claim) -> bool:
        return await self._sessions.end(address, claim)


class Scene:
    """A sender's service and a receiver's."""

    def __init__(self, near: DirectPort, far: DirectPort, sender: FakeEngine, receiver: FakeEngine) -> None:
        self.sender, self.receiver = sender, receiver
        self.device = FakeDevice()
        self.nccl = FakeNccl(self.device)
        self.timeout_s = PATIENCE_S
        self.changed = asyncio.Event()
        self.source_pool = near.service._pools.find(sender.pool_id)
        self.before = receiver.memory.copy()
        buffers, staging = Buffers(self.device, BUFFER_BYTES), Staging(self.device, 100)
        self.source = NcclSource(buffers, staging, self.nccl.unique_id, self._link)
        copier = RunCopier(self.device, 2, None)
        self.received = Buffers(self.device, BUFFER_BYTES)
        self.sink = NcclSink(self.received, copier, staging, self._link)
        self.copiers = ThreadPoolExecutor(2)
        landings = Landings(far.service._gate, far.service._pools.find)
        # A buffer's worth at a time, so that a layer takes several sends.
        sessions = PullSessions(landings, {"nccl": self.sink}, self.copiers, 256, PATIENCE_S)
        caller = Caller(sessions)
        self.transport = PullTransport(self.source, caller, b"near", "nccl 2.30.0")
        self.checked = PullTransport(self.source, caller, b"near", "nccl 2.30.0", checksums=True)

    async def open(
        self, reservation: str = "r", attempt: int = 1, *, checksums: bool = False, endpoint: str = "far:1"
    ) -> PullLane:
        target = [4, 5] if reservation != "other" else [6, 7]
        address = to_address(await self.receiver.grant(reservation, 0, 8, target))
        part = TokenRange(0, 8)
        request = PutRequest(
            Peer(endpoint, b"far", {"nccl": "nccl 2.30.0"}),
            self.source_pool,
            tuple(PAGES),
            part,
            address,
            Claim(part, attempt, "w"),
        )
        transport = self.checked if checksums else self.transport
        lane = await transport.open(request, self.changed.set)
        assert isinstance(lane, PullLane)
        return lane

    async def layers(self, lane: PullLane, count: int) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                self.changed.clear()
                if lane.check().layers_done >= count:
                    return
                await self.changed.wait()

    async def fails(self, lane: PullLane) -> ServiceError:
        with pytest.raises(ServiceError) as caught:
            await self.layers(lane, 99)
        return caught.value

    def _link(self, unique_id: bytes, rank: int) -> Link:
        clock, timeout_s = asyncio.get_running_loop().time, self.timeout_s

        def connect(stopped: threading.Event) -> Communicator:
            patience = Patience(clock, lambda: stopped.wait(0.0005) and None, timeout_s)
            return communicator.connect(self.nccl, self.device, unique_id, rank, patience, stopped)

        return Link(unique_id, connect)


@pytest_asyncio.fixture(loop_scope="session")
async def scene(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Scene]:
    # The memory of these pools stands for device memory.
    monkeypatch.setattr(Pool, "device_address", property(lambda pool: pool.pages.ctypes.data))
    near, far = DirectPort(), DirectPort(drain_timeout_s=PATIENCE_S)
    sender, receiver = FakeEngine(near, "p"), FakeEngine(far, "d")
    scene = Scene(near, far, await sender.start(seed=1), await receiver.start())
    yield scene
    await scene.source.close()
    await scene.sink.close()
    scene.copiers.shutdown()
    sender.close()
    receiver.close()
    await near.close()
    await far.close()


async def test_pages_arrive_layer_by_layer_and_the_communicator_is_used_again(scene: Scene) -> None:
    for attempt, reservation in enumerate(("r", "s"), 1):
        lane = await scene.open(reservation, attempt)
        for layers in range(1, 4):
            lane.post(layers)
            await scene.layers(lane, layers)
            wanted = expected(scene.before, scene.receiver, scene.sender, 0, 8, PAGES, TARGET, layers=layers)
            np.testing.assert_array_equal(scene.receiver.memory, wanted)
        assert await lane.finish() is True
        await lane.close()
        scene.receiver.memory[:] = scene.before
    calls = [call.split()[0] for call in scene.nccl.log]
    assert (calls.count("unique_id"), calls.count("init"), calls.count("abort")) == (1, 2, 0)
    assert calls.count("send") == calls.count("receive") == calls.count("group_start") / 2 > 6


async def test_checksums_of_what_arrived_whole(scene: Scene) -> None:
    lane = await scene.open(checksums=True)
    lane.post(3)
    await scene.layers(lane, 3)
    assert await lane.finish() is True
    await lane.close()
    # The communicator is as good as before.
    lane = await scene.open("s", 2)
    await lane.close()
    assert scene.nccl.log.count("unique_id") == 1


async def test_a_byte_that_arrives_otherwise_is_data_loss_and_fills_nothing(scene: Scene) -> None:
    watching = Watching(scene.receiver.watch())
    lane = await scene.open(checksums=True)
    lane.post(2)
    await scene.layers(lane, 2)
    scene.nccl.altered = True
    lane.post(3)
    await scene.layers(lane, 3)
    with pytest.raises(ServiceError) as caught:
        await lane.finish()
    assert (caught.value.code, caught.value.reason) == (Code.DATA_LOSS, "CHECKSUM_MISMATCH")
    await lane.close()
    await watching.until(lambda grants: grants["r"].state == pb.GRANT_STATE_OPEN and not grants["r"].committed)
    scene.nccl.altered = False
    await scene.receiver.revoke("r")
    again = await scene.open("again", checksums=True)
    again.post(3)
    await scene.layers(again, 3)
    assert await again.finish() is True
    await again.close()
    wanted = expected(scene.before, scene.receiver, scene.sender, 0, 8, PAGES, TARGET)
    np.testing.assert_array_equal(scene.receiver.memory, wanted)
    await watching.close()


async def test_a_revoke_waits_for_the_layer_that_is_hashed_and_the_next_one_is_left_alone(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages in other hands, or a pool that is unmapped, must not be read: on a GPU that ends the service."""
    reading, may_read, read = threading.Event(), threading.Event(), list[int]()
    checksum = scene.sink.checksum

    def held(pool: Pool, extents: Sequence[Extent]) -> int:
        read.append(len(extents))
        reading.set()
        assert may_read.wait(PATIENCE_S)
        return checksum(pool, extents)

    monkeypatch.setattr(scene.sink, "checksum", held)
    lane = await scene.open(checksums=True)
    lane.post(3)
    await scene.layers(lane, 3)
    finishing = asyncio.create_task(lane.finish())
    assert await asyncio.to_thread(reading.wait, PATIENCE_S)
    revoking = asyncio.create_task(scene.receiver.revoke("r"))
    await asyncio.sleep(0)  # it fences before it waits
    assert not revoking.done()
    may_read.set()
    await asyncio.wait_for(revoking, PATIENCE_S)
    with pytest.raises(ReservationGone):
        await finishing
    assert len(read) == 1
    await lane.close()


async def test_a_revoke_in_the_middle_lets_nothing_in_and_costs_the_communicator(scene: Scene) -> None:
    lane = await scene.open()
    lane.post(1)
    await scene.layers(lane, 1)
    settled = scene.receiver.memory.copy()
    for stream in scene.device.streams:
        stream.held = True
    lane.post(3)
    await asyncio.wait_for(scene.receiver.revoke("r"), PATIENCE_S)
    assert isinstance(await scene.fails(lane), ReservationGone)
    for stream in scene.device.streams:
        stream.held = False
    await lane.close()
    await scene.source.close()
    np.testing.assert_array_equal(scene.receiver.memory, settled)
    again = await scene.open("again")
    again.post(3)
    await scene.layers(again, 3)
    assert await again.finish() is True
    await again.close()
    assert scene.nccl.log.count("unique_id") == 2
    np.testing.assert_array_equal(
        scene.receiver.memory, expected(scene.before, scene.receiver, scene.sender, 0, 8, PAGES, TARGET)
    )


async def test_a_sender_that_never_connects(scene: Scene) -> None:
    scene.timeout_s = 0.01
    scene.nccl.failing.add("init")
    with pytest.raises(TransportFailed):
        await scene.open()
    scene.nccl.failing.clear()
    await scene.receiver.revoke("r")
    scene.timeout_s = PATIENCE_S
    lane = await scene.open("s")
    await lane.close()


async def test_the_death_of_the_peer_fails_the_push_and_a_new_pair_takes_its_place(scene: Scene) -> None:
    lane = await scene.open()
    lane.post(1)
    await scene.layers(lane, 1)
    scene.nccl.broken = True
    lane.post(2)
    assert isinstance(await scene.fails(lane), PeerLost)
    await lane.close()
    scene.nccl.broken = False
    await scene.receiver.revoke("r")
    again = await scene.open("again")
    again.post(3)
    await scene.layers(again, 3)
    assert await again.finish() is True
    await again.close()


async def test_a_receiver_that_lost_the_communicator_sends_the_push_elsewhere(scene: Scene) -> None:
    lane = await scene.open()
    lane.post(3)
    await scene.layers(lane, 3)
    await lane.finish()
    await lane.close()
    # As after a restart of the receiving service.
    await scene.sink.close()
    with pytest.raises(TransportFailed, match="of an earlier push is gone"):
        await scene.open("s")
    await scene.receiver.revoke("s")
    again = await scene.open("t")
    again.post(3)
    await scene.layers(again, 3)
    await again.close()


async def test_a_gpu_that_gives_no_stream_sends_the_push_elsewhere(scene: Scene) -> None:
    scene.device.failing.add("new_stream")
    with pytest.raises(TransportFailed, match="new_stream failed"):
        await scene.open()
    scene.device.failing.clear()


async def test_buffers_are_allocated_on_the_threads_of_links(scene: Scene) -> None:
    """An allocation may wait for what runs on the GPU, a kernel that waits for its peer for instance."""
    scene.device.allocating.clear()
    lane = await scene.open()
    lane.post(1)
    await scene.layers(lane, 1)
    assert scene.device.allocating == {"nccl_0"}
    await lane.close()


async def test_a_gpu_that_gives_no_buffer_fails_the_push(scene: Scene) -> None:
    lane = await scene.open()
    scene.device.failing.add("allocate")
    lane.post(1)
    failure = await scene.fails(lane)
    assert isinstance(failure, PeerLost)
    assert "allocate failed" in failure.message
    await lane.close()
    scene.device.failing.clear()
    await scene.receiver.revoke("r")
    again = await scene.open("again")
    again.post(3)
    await scene.layers(again, 3)
    assert await again.finish() is True
    await again.close()


async def test_a_lane_is_closed_when_its_source_is_read_no_more(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool that is unmapped under a copy ends the service."""
    aborted, abort = list[int](), scene.nccl.abort

    def abort_and_let_go(communicator: int) -> None:
        aborted.append(scene.nccl.rank(communicator))
        abort(communicator)
        for stream in scene.device.streams:
            stream.held = False

    monkeypatch.setattr(scene.nccl, "abort", abort_and_let_go)
    lane = await scene.open()
    lane.post(1)
    await scene.layers(lane, 1)
    for stream in scene.device.streams:
        stream.held = True
    lane.post(3)
    assert await asyncio.to_thread(scene.device.stuck.wait, PATIENCE_S)
    await asyncio.wait_for(lane.close(), PATIENCE_S)
    assert 0 in aborted
    assert not any(stream.queued for stream in scene.device.streams)


async def _move(scene: Scene, *lanes: PullLane) -> None:
    for lane in lanes:
        lane.post(3)
        await scene.layers(lane, 3)
        assert await lane.finish() is True
        await lane.close()


async def test_a_receiver_that_was_replaced_costs_one_push_and_not_one_for_each_link(scene: Scene) -> None:
    await _move(scene, await scene.open("r"), await scene.open("other"))
    # As after a restart of the receiving service.
    await scene.sink.close()
    with pytest.raises(TransportFailed, match="of an earlier push is gone"):
        await scene.open("s")
    await scene.receiver.revoke("s")
    await _move(scene, await scene.open("t"))


async def test_kernels_of_all_pushes_fit_on_a_gpu_and_none_takes_all_buffers(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 2 * buffers_module.NUM_BUFFERS * MAX_BLOCKS <= 108  # multiprocessors of an A100
    held, most, used_by = 0, 0, Buffers.used_by

    @asynccontextmanager
    async def counted(
        buffers: Buffers, start: Callable[[Buffer], asyncio.Future[None]]
    ) -> AsyncGenerator[Buffer, None]:
        nonlocal held, most
        async with used_by(buffers, start) as buffer:
            held += buffers is scene.received
            most = max(most, held)
            yield buffer
            held -= buffers is scene.received

    monkeypatch.setattr(Buffers, "used_by", counted)
    await _move(scene, await scene.open())
    assert 1 <= most <= 2


async def test_links_to_services_that_come_and_go_are_bounded(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "MAX_IDLE", 2)
    for index in range(4):
        await _move(scene, await scene.open(f"r{index}", endpoint=f"far:{index}"))
    # The newest two are used again, the one used longest ago is not.
    for index in (3, 2, 0):
        await _move(scene, await scene.open(f"s{index}", endpoint=f"far:{index}"))
    assert scene.nccl.log.count("unique_id") == 5


async def test_another_version_is_not_within_reach(scene: Scene) -> None:
    address = to_address(await scene.receiver.grant("r", 0, 8, TARGET))
    peer = Peer("far:1", b"far", {"nccl": "nccl 2.29.0"})
    assert scene.transport.refuses(scene.source_pool, address, peer) is not None
