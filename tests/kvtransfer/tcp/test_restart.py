"""Both transfer services and one engine restart at once, under their addresses, while the other engine lives."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from microserve.kvtransfer.v1 import kvtransfer_pb2 as pb

from services.protocol.errors import ServiceError
from services.rpc.pool_client import adopt
from tests.kvtransfer.engine import FakeEngine
from tests.kvtransfer.oracle import expected
from tests.kvtransfer.port import PATIENCE_S, Port
from tests.kvtransfer.process import ServiceProcess
from tests.kvtransfer.test_process import connected, start_service
from tests.ports import free_ports

pytestmark = pytest.mark.slow

__all__ = ["start_service"]


async def hand_back(engine: FakeEngine, port: Port) -> None:
    """The engine lived on: the next incarnation of its service gets the pool that it maps."""
    engine.port = port
    await engine.create(adopt=True)
    invitation = await engine.invitation()
    await asyncio.to_thread(adopt, engine.pool, invitation.socket_path, invitation.ticket)


@pytest.mark.parametrize("lives", ["sender", "receiver"])
async def test_both_services_and_an_engine(start_service: type[ServiceProcess], lives: str) -> None:
    """In the middle of a push. What was begun is over, nothing late lands anywhere, and the next push works."""
    # While neither runs nobody else may be given their ports, above all not the one that starts first.
    first = free_ports(2)
    addresses = [f"127.0.0.1:{port}" for port in (first, first + 1)]
    near, far = (start_service("--listen", address) for address in addresses)
    async with connected(near, "p") as (_, (sender,)), connected(far, "d") as (_, (receiver,)):
        stale = await receiver.grant("r", 0, 8, [4, 5])
        push = sender.push(sender.order(stale, 0, 8, [1, 2], ready_slot=0))
        sender.pool.raise_ready(0, 1)
        await push.layers(1)
        near.kill()
        far.kill()
        (receiver if lives == "sender" else sender).close()
        with pytest.raises(ServiceError):
            await push.done()
        kept = (sender if lives == "sender" else receiver).memory.copy()
        near, far = (start_service("--listen", address) for address in addresses)
        async with connected(near) as (near_port, _), connected(far) as (far_port, _):
            if lives == "sender":
                await hand_back(sender, near_port)
                receiver = await FakeEngine(far_port, "d").start(seed=3)
            else:
                await hand_back(receiver, far_port)
                sender = await FakeEngine(near_port, "p").start(seed=3)
            np.testing.assert_array_equal((sender if lives == "sender" else receiver).memory, kept)
            async with asyncio.timeout(PATIENCE_S):
                with pytest.raises(ServiceError) as caught:
                    await sender.push(sender.order(stale, 0, 8, [1, 2])).done()
            assert caught.value.reason == "STALE_EPOCH"
            before = receiver.memory.copy()
            address = await receiver.grant("r", 0, 8, [4, 5])
            last = await sender.push(sender.order(address, 0, 8, [1, 2])).done()
            assert (last.state, last.transport) == (pb.PUSH_STATE_COMMITTED, "tcp")
            np.testing.assert_array_equal(receiver.memory, expected(before, receiver, sender, 0, 8, [1, 2], [4, 5]))
            sender.close()
            receiver.close()
