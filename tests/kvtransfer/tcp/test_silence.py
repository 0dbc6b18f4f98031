"""A transfer service that stands still is lost to its peers by its silence, over real processes and sockets."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import numpy as np
import pytest
from microserve.kvtransfer.v1 import kvtransfer_pb2 as pb

from services.kvtransfer.transports.tcp.heartbeat import SILENCE_LIMIT_S
from services.protocol.errors import ServiceError
from tests.kvtransfer.engine import FakeEngine
from tests.kvtransfer.oracle import expected
from tests.kvtransfer.pattern import POISON
from tests.kvtransfer.process import ServiceProcess
from tests.kvtransfer.streams import Watching
from tests.kvtransfer.test_process import connected, start_service

pytestmark = pytest.mark.slow

__all__ = ["start_service"]

# Much more than the limit, for a busy machine; who stands still goes on only after it.
NOTICED_S = 12 * SILENCE_LIMIT_S


@contextmanager
def stopped(service: ServiceProcess) -> Iterator[None]:
    """Inside, the process stands still."""
    service.child.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        service.child.send_signal(signal.SIGCONT)


@asynccontextmanager
async def pair(near: ServiceProcess, far: ServiceProcess) -> AsyncIterator[tuple[FakeEngine, FakeEngine]]:
    """A sender and a receiver whose pages are poison."""
    async with connected(near, "p") as (_, (sender,)), connected(far, "d") as (_, (receiver,)):
        receiver.memory[:] = POISON
        yield sender, receiver


async def a_transfer_works(sender: FakeEngine, receiver: FakeEngine) -> None:
    before = receiver.memory.copy()
    address = await receiver.grant("after", 0, 8, [8, 9])
    last = await sender.push(sender.order(address, 0, 8, [1, 2])).done()
    assert (last.state, last.transport) == (pb.PUSH_STATE_COMMITTED, "tcp")
    np.testing.assert_array_equal(receiver.memory, expected(before, receiver, sender, 0, 8, [1, 2], [8, 9]))


async def test_the_receiving_service_stands_still(start_service: type[ServiceProcess]) -> None:
    """The sender's pages are free in time; what the receiver does afterwards commits nothing."""
    near, far = start_service(), start_service()
    async with pair(near, far) as (sender, receiver):
        address = await receiver.grant("r", 0, 8, [4, 5])
        watch = Watching(receiver.watch())
        push = sender.push(sender.order(address, 0, 8, [1, 2], ready_slot=0))
        sender.pool.raise_ready(0, 1)
        await push.layers(1)
        with stopped(far):
            async with asyncio.timeout(NOTICED_S):
                with pytest.raises(ServiceError) as caught:
                    await push.done()
            assert caught.value.reason == "PEER_LOST"
            # Nobody reads them any more.
            sender.memory[:] = 0
        await watch.until(lambda events: events["r"].state == pb.GRANT_STATE_OPEN)
        assert not watch.events["r"].committed
        await watch.close()
        await receiver.revoke("r")
        assert not (receiver.tokens[:, 4:6] == 0).any()
        await a_transfer_works(sender, receiver)


async def test_the_sending_service_stands_still(start_service: type[ServiceProcess]) -> None:
    """The receiver's pages are free at once, its attempt ends in time, and what the sender does later lands nowhere."""
    near, far = start_service(), start_service()
    async with pair(near, far) as (sender, receiver):
        address, other = await receiver.grant("r", 0, 8, [4, 5]), await receiver.grant("s", 0, 8, [6, 7])
        watch = Watching(receiver.watch())
        pushes = [sender.push(sender.order(target, 0, 8, [1, 2], ready_slot=0)) for target in (address, other)]
        sender.pool.raise_ready(0, 1)
        for push in pushes:
            await push.layers(1)
        with stopped(near):
            # A revoke waits for no peer, nor until its silence tells.
            async with asyncio.timeout(0.8 * SILENCE_LIMIT_S):
                await receiver.revoke("s")
            receiver.memory[:] = POISON
            sender.pool.raise_ready(0, 3)
            async with asyncio.timeout(NOTICED_S):
                await watch.until(lambda events: events["r"].state == pb.GRANT_STATE_OPEN)
        for push in pushes:
            with pytest.raises(ServiceError) as caught:
                await push.done()
            assert caught.value.reason in ("PEER_LOST", "RESERVATION_GONE")
        await watch.close()
        assert (receiver.memory == POISON).all()
        await a_transfer_works(sender, receiver)
