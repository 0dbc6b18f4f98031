"""Pushes over NCCL: what arrives, what is checked, and what a revoke lets in."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import numpy as np
import pytest
from microserve.kvtransfer.v1 import kvtransfer_pb2 as pb

from services.kvtransfer.pool import Pool
from services.kvtransfer.transports.pull.fetching import ByteRange
from services.protocol.errors import Code, ReservationGone, ServiceError
from tests.kvtransfer.nccl.scene import PAGES, TARGET, Scene
from tests.kvtransfer.oracle import expected
from tests.kvtransfer.port import PATIENCE_S
from tests.kvtransfer.streams import Watching


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

    def held(pool: Pool, ranges: Sequence[ByteRange]) -> int:
        read.append(len(ranges))
        reading.set()
        assert may_read.wait(PATIENCE_S)
        return checksum(pool, ranges)

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
