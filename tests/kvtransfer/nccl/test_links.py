"""Communicators, buffers and GPUs that fail, are replaced, or come and go: what a push over NCCL costs then."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import pytest

from services.kvtransfer.convert import to_address
from services.kvtransfer.errors import PeerLost, TransportFailed
from services.kvtransfer.transports.base import Peer
from services.kvtransfer.transports.nccl import buffers as buffers_module
from services.kvtransfer.transports.nccl import source as source_module
from services.kvtransfer.transports.nccl.buffers import Buffer, Buffers
from services.kvtransfer.transports.nccl.library import MAX_BLOCKS
from services.kvtransfer.transports.pull.lane import PullLane
from tests.kvtransfer.nccl.scene import TARGET, Scene
from tests.kvtransfer.port import PATIENCE_S


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
    await scene.succeeds("again")


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
    await scene.succeeds("again")


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
