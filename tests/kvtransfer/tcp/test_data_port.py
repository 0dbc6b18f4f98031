"""What comes over the data port is checked before a byte is taken, and a fence holds in the middle of a frame."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from microserve.kvtransfer.v1 import data_pb2 as pb
from microserve.kvtransfer.v1 import kvtransfer_pb2

from services.kvtransfer.landing import Landings
from services.kvtransfer.transports.tcp import heartbeat, inbound
from services.kvtransfer.transports.tcp.wire import MAX_PUT_BYTES, Header, Kind, encode_message
from tests.kvtransfer.engine import FakeEngine
from tests.kvtransfer.pattern import POISON
from tests.kvtransfer.port import PATIENCE_S, DirectPort
from tests.kvtransfer.streams import Watching
from tests.kvtransfer.tcp.raw_peer import RawPeer, put

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest_asyncio.fixture(loop_scope="session")
async def port() -> AsyncIterator[DirectPort]:
    port = DirectPort(data_connections=3)
    yield port
    while RawPeer.all:
        await RawPeer.all.pop().close()
    await port.close()


@pytest_asyncio.fixture(loop_scope="session")
async def receiver(port: DirectPort) -> AsyncIterator[FakeEngine]:
    engine = await FakeEngine(port, "d").start()
    yield engine
    engine.close()


async def still_serves(port: DirectPort, receiver: FakeEngine) -> None:
    """A whole put by a well-behaved sender."""
    address = await receiver.grant("after", 0, 8, [8, 9])
    peer = await RawPeer.welcomed(port)
    peer.open(1, address, (0, 8))
    assert (await peer.message()).opened.verbatim
    for layer in range(3):
        peer.say(put(1, layer, 0, 8, receiver))
        assert (await peer.header()).kind is Kind.LANDED
    peer.say(encode_message(1, pb.DataMessage(finish=pb.FinishPut())))
    assert (await peer.message()).finished.committed
    assert (receiver.tokens[:, 8:10] == 7).all()
    await peer.close()


STRANGERS: dict[str, tuple[Callable[[RawPeer, DirectPort], None], str]] = {
    "noise": (lambda peer, _: peer.say(b"GET / HTTP/1.1\r\nHost: example\r\n\r\n"), "PROTOCOL_VIOLATION"),
    "a frame too long": (
        lambda peer, _: peer.say(Header(Kind.MESSAGE, length=MAX_PUT_BYTES).encode()),
        "PROTOCOL_VIOLATION",
    ),
    "no hello": (lambda peer, _: peer.say(Header(Kind.PUT, 1, length=64).encode()), "PROTOCOL_VIOLATION"),
    "another version": (lambda peer, port: peer.hello(port.service.epoch, 99), "PROTOCOL_VIOLATION"),
    "another incarnation": (lambda peer, _: peer.hello(bytes(16)), "STALE_EPOCH"),
    "no message": (
        lambda peer, _: peer.say(Header(Kind.MESSAGE, length=4).encode() + b"\xff\xff\xff\xff"),
        "PROTOCOL_VIOLATION",
    ),
}


@pytest.mark.parametrize(("say", "reason"), STRANGERS.values(), ids=[name.replace(" ", "_") for name in STRANGERS])
async def test_a_stranger_is_turned_away(
    port: DirectPort, receiver: FakeEngine, say: Callable[[RawPeer, DirectPort], None], reason: str
) -> None:
    peer = await RawPeer.connect(port)
    say(peer, port)
    assert await peer.refused() == reason
    await still_serves(port, receiver)


async def test_a_stranger_that_never_says_who_it_is(
    port: DirectPort, receiver: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is alive, and takes a place that others want."""
    monkeypatch.setattr(heartbeat, "SILENCE_LIMIT_S", 0.2)
    peer = await RawPeer.connect(port)
    async with asyncio.timeout(PATIENCE_S):
        while not await peer.is_cut():
            peer.say(Header(Kind.BEAT).encode())
    monkeypatch.undo()
    await still_serves(port, receiver)


WRONG_FRAMES: dict[str, Callable[[FakeEngine], bytes]] = {
    "another put": lambda e: put(2, 0, 0, 8, e),
    "a later layer": lambda e: put(1, 1, 0, 8, e),
    "a later token": lambda e: put(1, 0, 4, 8, e),
    "beyond the put": lambda e: put(1, 0, 0, 12, e),
    "nothing": lambda e: put(1, 0, 0, 0, e),
    "fewer bytes than tokens": lambda e: Header(Kind.PUT, 1, 0, 0, 8, 64).encode() + bytes(64),
    "unfinished": lambda _: encode_message(1, pb.DataMessage(finish=pb.FinishPut())),
    "what only receivers say": lambda _: Header(Kind.LANDED, 1).encode(),
}


@pytest.mark.parametrize("frame", WRONG_FRAMES.values(), ids=[name.replace(" ", "_") for name in WRONG_FRAMES])
async def test_a_wrong_frame_ends_its_connection_and_attempt(
    port: DirectPort, receiver: FakeEngine, frame: Callable[[FakeEngine], bytes]
) -> None:
    address = await receiver.grant("r", 0, 8, [4, 5])
    watch = Watching(receiver.watch())
    peer = await RawPeer.welcomed(port)
    peer.open(1, address, (0, 8))
    await peer.message()
    await watch.until(lambda events: events["r"].state == kvtransfer_pb2.GRANT_STATE_WRITING)
    peer.say(frame(receiver))
    assert await peer.refused() == "PROTOCOL_VIOLATION"
    assert (receiver.memory == POISON).all()
    # Nobody is in the way of another sender.
    await watch.until(lambda events: events["r"].state == kvtransfer_pb2.GRANT_STATE_OPEN)
    await watch.close()
    await still_serves(port, receiver)


async def test_a_proof_is_good_once(port: DirectPort, receiver: FakeEngine) -> None:
    """What was overheard on one connection opens nothing on another."""
    address = await receiver.grant("r", 0, 8, [4, 5])
    first, second = await RawPeer.welcomed(port), await RawPeer.welcomed(port)
    assert first.challenge != second.challenge
    second.challenge = first.challenge
    second.open(1, address, (0, 8))
    assert (await second.message()).error.reason == "WRONG_SECRET"
    await first.close()
    await second.close()


async def test_a_fence_holds_in_the_middle_of_a_frame(port: DirectPort, receiver: FakeEngine) -> None:
    """The revoke is acknowledged while half of a frame is on its way, and the other half goes nowhere."""
    address = await receiver.grant("r", 0, 8, [4, 5])
    watch = Watching(receiver.watch())
    peer = await RawPeer.welcomed(port)
    peer.open(1, address, (0, 8))
    await peer.message()
    frame = put(1, 0, 0, 8, receiver)
    peer.say(frame[: len(frame) // 2])
    await watch.until(lambda events: events["r"].bytes > 0)
    async with asyncio.timeout(PATIENCE_S):
        await receiver.revoke("r")
    # The pages are the receiver's own again.
    receiver.memory[:] = POISON
    assert (await peer.message()).error.reason == "RESERVATION_GONE"
    peer.say(frame[len(frame) // 2 :])
    # Answered in order: the rest of the frame was read.
    peer.say(encode_message(2, pb.DataMessage(probe=pb.Probe())))
    assert (await peer.message()).HasField("probed")
    assert (receiver.memory == POISON).all()
    await peer.close()
    await watch.close()


async def test_an_attempt_lives_on_one_connection(port: DirectPort, receiver: FakeEngine) -> None:
    """A second connection does not join it, because frames of the first may still be on their way: both lose it."""
    address = await receiver.grant("r", 0, 8, [4, 5])
    first, second = await RawPeer.welcomed(port), await RawPeer.welcomed(port)
    first.open(1, address, (0, 8))
    await first.message()
    second.open(1, address, (0, 8))
    assert (await second.message()).error.reason == "ATTEMPT_SUPERSEDED"
    assert (await first.message()).error.reason == "ATTEMPT_SUPERSEDED"
    await first.close()
    await second.close()


async def test_one_connection_too_many(port: DirectPort, receiver: FakeEngine) -> None:
    peers = [await RawPeer.welcomed(port) for _ in range(3)]
    for number, peer in enumerate(peers):
        address = await receiver.grant(f"r{number}", 0, 8, [2 * number, 2 * number + 1])
        peer.open(1, address, (0, 8))
        assert (await peer.message()).HasField("opened")
        # Between two puts of its attempt a connection is needed, too.
        peer.say(encode_message(1, pb.DataMessage(close=pb.ClosePut())))
    late = await RawPeer.connect(port)
    assert await late.refused() == "TOO_MANY_CONNECTIONS"
    for peer in peers:
        peer.say(b"\xff" * 64)
        assert await peer.refused() == "PROTOCOL_VIOLATION"
    await still_serves(port, receiver)


async def test_a_connection_that_nobody_needs_makes_room(port: DirectPort, receiver: FakeEngine) -> None:
    """The one used longest ago."""
    peers = [await RawPeer.welcomed(port) for _ in range(3)]
    peers[0].say(encode_message(1, pb.DataMessage(probe=pb.Probe())))
    assert (await peers[0].message()).HasField("probed")
    late = await RawPeer.welcomed(port)
    async with asyncio.timeout(PATIENCE_S):
        while not await peers[1].is_cut():
            pass
    for peer in (peers[0], peers[2], late):
        peer.say(encode_message(2, pb.DataMessage(probe=pb.Probe())))
        assert (await peer.message()).HasField("probed")


async def test_more_questions_than_answers(
    port: DirectPort, receiver: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asks on and on while nothing is answered is cut off, and what it asked costs no more memory."""
    address = await receiver.grant("r", 0, 8, [4, 5])
    answering, opened = asyncio.Event(), Landings.open

    async def later(*arguments: Any) -> Any:
        await answering.wait()
        return await opened(*arguments)

    with monkeypatch.context() as context:
        context.setattr(inbound, "_MOST_PUTS", 2)
        context.setattr(Landings, "open", later)
        peer = await RawPeer.welcomed(port)
        for number in range(1, 4):
            peer.open(number, address, (0, 8))
        assert await peer.refused() == "PROTOCOL_VIOLATION"
    answering.set()
    await receiver.revoke("r")
    await still_serves(port, receiver)


async def test_the_secret_does_not_travel(port: DirectPort, receiver: FakeEngine) -> None:
    address = await receiver.grant("r", 0, 8, [4, 5])
    sent: list[bytes] = []
    peer = await RawPeer.welcomed(port)
    peer.say = sent.append  # type: ignore[method-assign]
    peer.open(1, address, (0, 8))
    assert address.secret not in b"".join(sent)
    assert np.frombuffer(b"".join(sent), np.uint8).size > 100
    await peer.close()
