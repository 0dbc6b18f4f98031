"""Two service processes and the real library, over shared memory and over TCP of the loopback device."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack

import numpy as np
import pytest
import pytest_asyncio
from microserve.kvtransfer.v1 import kvtransfer_pb2 as pb
from microserve.types.v1 import kv_pb2

from services.protocol.errors import ServiceError
from tests.kvtransfer import process
from tests.kvtransfer.engine import FakeEngine, Shape
from tests.kvtransfer.nixl.installed import needs_nixl
from tests.kvtransfer.oracle import expected
from tests.kvtransfer.pattern import POISON
from tests.kvtransfer.port import GrpcPort
from tests.kvtransfer.process import ServiceProcess
from tests.kvtransfer.streams import Watching

pytestmark = [needs_nixl, pytest.mark.slow]

# Else the probe chooses between the two.
NIXL_ALONE = ("--nixl-devices", "lo", "--data-listen", "none")
# 32 MiB a layer: long enough to be stopped in the middle.
LARGE = Shape(layers=4, heads=8, head_dim=64, page_size=16, pages=512)


class Nodes:
    """Two nodes: a sender's service and a receiver's, each with an engine."""

    def __init__(self, stack: ExitStack) -> None:
        # One side that wants the bytes checked is enough.
        self.near, self.far = ServiceProcess(*NIXL_ALONE, "--checksums"), ServiceProcess(*NIXL_ALONE)
        stack.callback(self.far.kill)
        stack.callback(self.near.kill)
        self._stack = stack
        self.ports: list[GrpcPort] = []

    async def engine(self, service: ServiceProcess, name: str, shape: Shape, seed: int | None = None) -> FakeEngine:
        self.ports.append(GrpcPort(service.address))
        engine = FakeEngine(self.ports[-1], name, shape)
        self._stack.callback(engine.close)
        return await engine.start(seed=seed)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest_asyncio.fixture(loop_scope="session")
async def nodes(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, stack: ExitStack
) -> AsyncIterator[Nodes]:
    """Over the transports of UCX that the test's parameter names."""
    monkeypatch.setitem(process.ENVIRONMENT, "UCX_TLS", getattr(request, "param", "sm,tcp"))
    nodes = Nodes(stack)
    yield nodes
    for port in nodes.ports:
        await port.close()


@pytest.mark.parametrize("nodes", ["sm,tcp", "tcp"], indirect=True)
async def test_layer_by_layer_with_partial_pages(nodes: Nodes) -> None:
    shape = Shape(layers=5, heads=3, head_dim=5, page_size=16, dtype=kv_pb2.DTYPE_BFLOAT16)
    sender = await nodes.engine(nodes.near, "p", shape, seed=1)
    receiver = await nodes.engine(nodes.far, "d", shape)
    before = receiver.memory.copy()
    address = await receiver.grant("r", 3, 61, [9, 2, 3, 15])
    push = sender.push(sender.order(address, 3, 61, [4, 5, 1, 0], ready_slot=0))
    for layers in range(1, 6):
        sender.pool.raise_ready(0, layers)
        await push.layers(layers)
    last = await push.done()
    assert (last.transport, last.state) == ("nixl", pb.PUSH_STATE_COMMITTED)
    wanted = expected(before, receiver, sender, 3, 61, [4, 5, 1, 0], [9, 2, 3, 15])
    np.testing.assert_array_equal(receiver.memory, wanted)


@pytest.mark.parametrize("nodes", ["tcp"], indirect=True)
async def test_a_stopped_sender_holds_no_page(nodes: Nodes) -> None:
    """Its reads are under way when the grant is revoked; they end long after and land in no page."""
    sender = await nodes.engine(nodes.near, "p", LARGE, seed=1)
    receiver = await nodes.engine(nodes.far, "d", LARGE)
    num_tokens = LARGE.pages * LARGE.page_size
    address = await receiver.grant("r", 0, num_tokens, list(range(LARGE.pages)))
    push = sender.push(sender.order(address, 0, num_tokens, list(range(LARGE.pages))))
    await push.wait_for(lambda: bool(push.messages) and push.messages[-1].bytes > 0)
    nodes.near.child.send_signal(signal.SIGSTOP)
    await receiver.revoke("r")
    receiver.memory[:] = POISON
    nodes.near.child.send_signal(signal.SIGCONT)
    with pytest.raises(ServiceError) as caught:
        await push.done()
    assert caught.value.reason == "RESERVATION_GONE"
    # A later push goes over the same connection, behind everything that was late.
    again = await receiver.grant("again", 0, 16, [7])
    await sender.push(sender.order(again, 0, 16, [3])).done()
    rest = receiver.tokens.reshape(LARGE.layers, LARGE.pages, -1)
    assert np.all(np.delete(rest, 7, axis=1) == POISON)


async def test_a_killed_sender_leaves_the_range_to_another(nodes: Nodes) -> None:
    sender = await nodes.engine(nodes.near, "p", Shape(), seed=1)
    receiver = await nodes.engine(nodes.far, "d", Shape())
    watch = Watching(receiver.watch())
    address = await receiver.grant("r", 0, 8, [4, 5])
    push = sender.push(sender.order(address, 0, 8, [1, 2], ready_slot=0))
    sender.pool.raise_ready(0, 1)
    await push.layers(1)
    nodes.near.kill()
    with pytest.raises(ServiceError):
        await push.done()
    await watch.until(lambda events: events["r"].state == pb.GRANT_STATE_OPEN and events["r"].bytes > 0)
    await watch.close()
    before = receiver.memory.copy()
    # The service of the node comes back under another epoch, with an engine of the same name.
    nodes.near = ServiceProcess(*NIXL_ALONE, "--listen", nodes.near.address)
    try:
        heir = await nodes.engine(nodes.near, "p", Shape(), seed=2)
        last = await heir.push(heir.order(address, 0, 8, [1, 2], attempt=2)).done()
        assert last.transport == "nixl"
        np.testing.assert_array_equal(receiver.memory, expected(before, receiver, heir, 0, 8, [1, 2], [4, 5]))
    finally:
        nodes.near.kill()


async def test_a_killed_receiver_is_a_typed_error(nodes: Nodes) -> None:
    sender = await nodes.engine(nodes.near, "p", Shape(), seed=1)
    receiver = await nodes.engine(nodes.far, "d", Shape())
    address = await receiver.grant("r", 0, 8, [4, 5])
    push = sender.push(sender.order(address, 0, 8, [1, 2], ready_slot=0))
    sender.pool.raise_ready(0, 1)
    await push.layers(1)
    nodes.far.kill()
    with pytest.raises(ServiceError) as caught:
        await push.done()
    assert caught.value.reason in ("PEER_LOST", "UNAVAILABLE")


async def test_an_attempt_is_ended_from_afar(nodes: Nodes) -> None:
    sender = await nodes.engine(nodes.near, "p", Shape(), seed=1)
    receiver = await nodes.engine(nodes.far, "d", Shape())
    address = await receiver.grant("r", 0, 8, [4, 5])
    order = sender.order(address, 0, 8, [1, 2], ready_slot=0)
    push = sender.push(order)
    await push.opened()
    assert await sender.end_attempt(order) is False
    with pytest.raises(ServiceError) as caught:
        await push.done()
    assert caught.value.reason in ("PUSH_CANCELLED", "ATTEMPT_SUPERSEDED")
    with pytest.raises(ServiceError) as caught:
        await sender.push(order).done()
    assert caught.value.reason == "ATTEMPT_SUPERSEDED"
    await sender.push(sender.order(address, 0, 8, [1, 2], attempt=2)).done()
