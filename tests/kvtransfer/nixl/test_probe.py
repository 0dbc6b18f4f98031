"""How fast NIXL is to a peer, as the receiving service finds out; and that the choice follows from it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack

import numpy as np
import pytest
import pytest_asyncio
from microserve.kvtransfer.v1 import kvtransfer_pb2 as pb

from services.kvtransfer.errors import NoTransport, PeerLost, TransportFailed
from services.kvtransfer.transports.nixl.library import ReadState, Span
from services.kvtransfer.transports.nixl.source import Offer
from services.kvtransfer.transports.pull import probing
from tests.kvtransfer.engine import FakeEngine
from tests.kvtransfer.nixl.fake_agent import FakeAgent, World, make_world
from tests.kvtransfer.nixl.installed import needs_nixl
from tests.kvtransfer.port import PATIENCE_S, DirectPort, GrpcPort
from tests.kvtransfer.process import ServiceProcess

PROBE_BYTES = 4 << 20


@pytest_asyncio.fixture(loop_scope="session")
async def world(monkeypatch: pytest.MonkeyPatch) -> World:
    # Of probes that are to succeed: a busy machine takes its time, and none of these tests is of speed.
    monkeypatch.setattr(probing, "PROBE_TIMEOUT_S", PATIENCE_S)
    return make_world(monkeypatch)


@pytest_asyncio.fixture(loop_scope="session")
async def port(world: World) -> AsyncIterator[DirectPort]:
    port = DirectPort(nixl_devices="lo")
    yield port
    await port.close()


@pytest_asyncio.fixture(loop_scope="session")
async def offer(world: World) -> AsyncIterator[bytes]:
    memory = np.arange(PROBE_BYTES, dtype=np.uint8)
    span = Span(memory.ctypes.data, memory.nbytes)
    yield Offer(span, FakeAgent(world, "prober").metadata()).encode()
    assert memory.nbytes  # it must live as long as anything may read it


async def test_all_of_the_memory_is_fetched_and_put_in_place(port: DirectPort, world: World, offer: bytes) -> None:
    num_bytes, elapsed_s = await port.service.pull_probes.serve("nixl", offer)
    assert num_bytes == PROBE_BYTES
    assert elapsed_s > 0
    assert len(world.reads) == 3  # one that makes the connection, and two of the largest pieces
    again, _ = await port.service.pull_probes.serve("nixl", offer)
    assert again == PROBE_BYTES


async def test_small_pieces_make_a_smaller_probe(world: World, offer: bytes) -> None:
    port = DirectPort(nixl_devices="lo", max_copy_bytes=512)
    num_bytes, _ = await port.service.pull_probes.serve("nixl", offer)
    assert num_bytes == 16 * 512
    await port.close()


async def test_a_source_that_does_not_answer_costs_a_moment_and_no_page(
    port: DirectPort, world: World, offer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver = await FakeEngine(port, "d").start()
    before = receiver.memory.copy()
    monkeypatch.setattr(probing, "PROBE_TIMEOUT_S", 0.01)
    world.held = True
    with pytest.raises(TransportFailed, match="did not end"):
        await port.service.pull_probes.serve("nixl", offer)
    monkeypatch.setattr(probing, "PROBE_TIMEOUT_S", PATIENCE_S)
    # What comes late lands in buffers of their own; the next probe is not in its way.
    world.held = False
    for read in world.reads:
        read.end()
    assert (await port.service.pull_probes.serve("nixl", offer))[0] == PROBE_BYTES
    np.testing.assert_array_equal(receiver.memory, before)
    receiver.close()


async def test_a_read_that_fails_is_a_lost_peer(port: DirectPort, world: World, offer: bytes) -> None:
    world.held = True
    probe = asyncio.create_task(port.service.pull_probes.serve("nixl", offer))
    (await world.until_posted(1)).end(ReadState.FAILED)
    with pytest.raises(PeerLost):
        await probe


async def test_what_cannot_be_probed(port: DirectPort, offer: bytes) -> None:
    with pytest.raises(NoTransport):
        await port.service.pull_probes.serve("tcp", offer)
    with pytest.raises(TransportFailed):
        await port.service.pull_probes.serve("nixl", b"no offer")
    plain = DirectPort()
    with pytest.raises(NoTransport):
        await plain.service.pull_probes.serve("nixl", offer)
    await plain.close()


@needs_nixl
@pytest.mark.slow
async def test_between_real_services_the_faster_of_nixl_and_tcp_is_used() -> None:
    with ExitStack() as stack:
        near, far = (ServiceProcess("--nixl-devices", "lo") for _ in range(2))
        stack.callback(far.kill)
        stack.callback(near.kill)
        ports = [GrpcPort(near.address), GrpcPort(far.address)]
        sender, receiver = FakeEngine(ports[0], "p"), FakeEngine(ports[1], "d")
        await sender.start(seed=1)
        await receiver.start()
        address = await receiver.grant("r", 0, 8, [4, 5])
        last = await sender.push(sender.order(address, 0, 8, [1, 2])).done()
        (link,) = (await ports[0].call("GetStats", pb.GetStatsRequest())).links
        speeds = {speed.transport: speed.bytes_per_second for speed in link.speeds}
        assert set(speeds) == {"nixl", "tcp"}
        assert min(speeds.values()) > 0
        assert last.transport == link.transport == max(speeds, key=lambda name: speeds[name])
        assert link.fallback_count == 0
        for one in (sender, receiver):
            one.close()
        for each in ports:
            await each.close()
