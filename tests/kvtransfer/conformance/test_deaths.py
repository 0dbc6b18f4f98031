"""The death of one side is a bounded, typed error for its peers and nothing for the others."""

from __future__ import annotations

import asyncio
import os

import numpy as np
import pytest
from microserve.kvtransfer.v1 import kvtransfer_pb2 as pb

from services.protocol.errors import ServiceError
from tests.kvtransfer.conftest import StartEngine, StartProcess
from tests.kvtransfer.engine import FakeEngine
from tests.kvtransfer.oracle import expected
from tests.kvtransfer.pattern import POISON, pattern
from tests.kvtransfer.port import Port
from tests.kvtransfer.process import EngineProcess
from tests.kvtransfer.streams import Pushing, Watching


async def _fails(push: Pushing) -> str:
    with pytest.raises(ServiceError) as caught:
        await push.done()
    return caught.value.reason


async def _sender(port: Port, name: str, start_process: StartProcess) -> tuple[FakeEngine, EngineProcess]:
    """An engine whose memory is held by a process of its own; its calls are made from here."""
    sender = FakeEngine(port, name)
    await sender.create()
    invitation = await sender.invitation()
    process = await asyncio.to_thread(start_process, invitation.socket_path, invitation.ticket, 11)
    return sender, process


@pytest.mark.parametrize("forked", [False, True], ids=["alone", "leaving_a_child_with_its_socket"])
async def test_the_sender_is_killed(
    port: Port, start_engine: StartEngine, start_process: StartProcess, forked: bool
) -> None:
    bystander, receiver = await start_engine("q", seed=2), await start_engine("d")
    watch = Watching(receiver.watch())
    sender, process = await _sender(port, f"killed-{forked}", start_process)
    if forked:
        process.fork()
    address = await receiver.grant("r", 0, 8, [4, 5])
    other = await receiver.grant("other", 0, 8, [6, 7])
    undisturbed = bystander.push(bystander.order(other, 0, 8, [1, 2], ready_slot=0))
    push = sender.push(sender.order(address, 0, 8, [1, 2], ready_slot=0))
    process.raise_ready(0, 1)
    await push.layers(1)
    await watch.until(lambda events: events["r"].state == pb.GRANT_STATE_WRITING)
    process.child.kill()
    assert await _fails(push) == "ENGINE_GONE"
    # The attempt that it left open is ended, so that another sender may try.
    await watch.until(lambda events: events["r"].state == pb.GRANT_STATE_OPEN)
    receiver.memory[:] = POISON
    before = receiver.memory.copy()
    # Cut otherwise, too: nobody is in the way.
    await bystander.push(bystander.order(address, 0, 4, [3], attempt=1, writer_id="again")).done()
    bystander.pool.raise_ready(0, 3)
    await undisturbed.done()
    wanted = expected(before, receiver, bystander, 0, 4, [3], [4, 5])
    wanted = expected(wanted, receiver, bystander, 0, 8, [1, 2], [6, 7])
    np.testing.assert_array_equal(receiver.memory, wanted)
    await watch.close()


async def test_an_attempt_between_two_pushes_ends_with_its_engine(port: Port, start_engine: StartEngine) -> None:
    sender, receiver = await start_engine("p", seed=1), await start_engine("d")
    address = await receiver.grant("r", 0, 8, [4, 5])
    watch = Watching(receiver.watch())
    order = sender.order(address, 0, 4, [1])
    order.attempt_range.end = 8
    assert (await sender.push(order).done()).state == pb.PUSH_STATE_DONE
    await watch.until(lambda events: events["r"].state == pb.GRANT_STATE_WRITING)
    sender.close()
    await watch.until(lambda events: events["r"].state == pb.GRANT_STATE_OPEN)
    await watch.close()


async def test_the_receiver_is_killed(far_port: Port, start_engine: StartEngine, start_process: StartProcess) -> None:
    sender, other = await start_engine("p", seed=1), await start_engine("e")
    receiver, process = await _sender(far_port, "killed-receiver", start_process)
    address = await receiver.grant("r", 0, 8, [4, 5])
    push = sender.push(sender.order(address, 0, 8, [1, 2], ready_slot=0))
    elsewhere = await other.grant("r", 0, 8, [4, 5])
    undisturbed = sender.push(sender.order(elsewhere, 0, 8, [1, 2], ready_slot=1))
    sender.pool.raise_ready(0, 1)
    await push.layers(1)
    await undisturbed.opened()
    process.child.kill()
    assert await _fails(push) == "RESERVATION_GONE"
    sender.pool.raise_ready(1, 3)
    await undisturbed.done()


async def test_a_new_engine_finds_nothing_under_way(start_engine: StartEngine) -> None:
    """AttachPool drains what was written into the pool and what was pushed out of it."""
    sender, receiver = await start_engine("p", seed=1), await start_engine("d")
    inward = await receiver.grant("in", 0, 8, [4, 5])
    outward = await sender.grant("out", 0, 8, [6, 7])
    writing = sender.push(sender.order(inward, 0, 8, [1, 2], ready_slot=0))
    reading = receiver.push(receiver.order(outward, 0, 8, [1, 2], ready_slot=0))
    await writing.opened()
    await reading.opened()
    watch = Watching(receiver.watch())
    await watch.until(lambda events: "in" in events)
    old = receiver.incarnation
    pool_id = receiver.pool_id
    receiver.close()
    receiver.incarnation = os.urandom(16)
    await receiver.create()
    assert receiver.pool_id == pool_id
    await receiver.attach()
    assert await _fails(writing) == "RESERVATION_GONE"
    assert await _fails(reading) == "ENGINE_GONE"
    with pytest.raises(ServiceError) as caught:
        await watch.until(lambda events: False)
    assert caught.value.reason == "ENGINE_GONE"
    # The counter that the old engine was to raise is the new one's now.
    assert receiver.pool.control[0] == 0
    receiver.memory[:] = POISON
    sender.pool.raise_ready(0, 3)
    receiver.incarnation, new = old, receiver.incarnation
    with pytest.raises(ServiceError) as caught:
        await receiver.grant("in", 0, 8, [4, 5])
    assert caught.value.reason == "STALE_INCARNATION"
    # The same reservation id means another reservation for another engine.
    receiver.incarnation = new
    again = await receiver.grant("in", 0, 8, [4, 5])
    assert (receiver.memory == POISON).all()
    await sender.push(sender.order(again, 0, 8, [1, 2])).done()
    await watch.close()


async def test_memory_of_a_dead_engine_is_kept_for_the_next(
    port: Port, start_engine: StartEngine, start_process: StartProcess
) -> None:
    """The killed engine's writes are in the pool that its successor maps, so nothing was torn down under a copy."""
    engine, process = await _sender(port, "successor", start_process)
    process.kill()
    engine.incarnation = os.urandom(16)
    await engine.create()
    await engine.attach()
    np.testing.assert_array_equal(engine.memory, pattern(11, len(engine.memory)))
    engine.close()
