"""The sending side of a pull, against a receiver that the test plays."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import numpy as np
import pytest
import xxhash

from services.kvtransfer.errors import NotDrained, NoTransport, PeerLost, TransportFailed
from services.kvtransfer.landing import Claim
from services.kvtransfer.pool import Pool, PoolShape
from services.kvtransfer.transports.base import Peer, PutProgress, PutRequest, Unsupported
from services.kvtransfer.transports.pull import lane as lane_module
from services.kvtransfer.transports.pull.checksums import host_checksum
from services.kvtransfer.transports.pull.fetching import ByteRange, Fetch
from services.kvtransfer.transports.pull.lane import PullLane, PullTransport
from services.kvtransfer.transports.pull.probing import make_probe_memory
from services.kvtransfer.transports.pull.puller import PullState
from services.kvtransfer.transports.pull.session import (
    Answer,
    Checksums,
    Finished,
    Last,
    Opened,
    PullOpen,
    Ready,
    Said,
)
from services.protocol.address import KvAddress
from services.protocol.errors import Code, ServiceError
from services.protocol.extents import ModelPart
from services.protocol.grants import AlreadyCommitted
from services.protocol.layout import Dtype, PageLayout
from services.protocol.ranges import TokenRange
from services.rpc.status import RemoteError
from tests.kvtransfer.port import PATIENCE_S

LAYOUT = PageLayout(2, 1, 4, 4, Dtype.FLOAT32)
PART = TokenRange(0, 4)
ADDRESS = KvAddress("r", "there:1", b"there", b"secret", PART, (), LAYOUT, b"", b"")
HERE, THERE = b"here", Peer("there:1", b"there", {"nixl": "1"})


class Receiver:
    """A PullCaller: says what the test scripts, and notes what it hears."""

    def __init__(self, *script: Answer | ServiceError | float) -> None:
        self._script = script
        self.heard: list[Said] = []
        self.silent = False
        self.asks: list[Fetch] = []

    async def pull(self, endpoint: str, opening: PullOpen, said: AsyncIterator[Said]) -> AsyncGenerator[Answer, None]:
        for answer in self._script:
            if isinstance(answer, ServiceError):
                raise answer
            assert not isinstance(answer, float)
            yield answer
        async for word in said:
            self.heard.append(word)
            if isinstance(word, Ready):
                for fetch in self.asks:
                    yield fetch
            if self.silent:
                await asyncio.Event().wait()
            if word is Last.FINISH:
                yield Finished(committed=True)

    async def end(self, endpoint: str, address: KvAddress, claim: Claim) -> bool:
        return endpoint == "there:1"

    async def probe(self, endpoint: str, transport: str, offer: bytes) -> float:
        assert (endpoint, transport, offer) == ("there:1", "nixl", b"offer")
        (answer,) = self._script
        assert isinstance(answer, ServiceError | float)
        if isinstance(answer, ServiceError):
            raise answer
        return answer


class Side:
    """A SourceSide that notes who is served."""

    name = "nixl"

    offer = b"offer"

    def __init__(self) -> None:
        self.serving = 0
        self.kept = False
        self.sent: list[Sequence[ByteRange]] = []

    async def send(self, ranges: Sequence[ByteRange]) -> None:
        self.sent.append(ranges)

    def keep(self) -> None:
        self.kept = True

    def refuses(self, source: Pool) -> None:
        return None

    def checksum(self, pool: Pool, ranges: Sequence[ByteRange]) -> int:
        return host_checksum(pool, ranges)

    @asynccontextmanager
    async def serve(self, pool: Pool, endpoint: str) -> AsyncGenerator[Side, None]:
        self.serving += 1
        try:
            yield self
        finally:
            self.serving -= 1


def _pool(layout: PageLayout = LAYOUT) -> Pool:
    return Pool("pool", "engine", PoolShape(layout, 4, ModelPart.all_of(layout.layer_count, layout.kv_head_count)))


def _transport(receiver: Receiver, side: Side | None = None) -> PullTransport:
    return PullTransport(side or Side(), receiver, HERE, "1")


async def _until_it_fails(lane: PullLane, changed: asyncio.Event) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            changed.clear()
            lane.check()
            await changed.wait()


async def _open(transport: PullTransport, on_change: Callable[[], None] = lambda: None) -> PullLane:
    request = PutRequest(THERE, _pool(), (0,), PART, ADDRESS, Claim(PART, 1, "w"))
    lane = await transport.open(request, on_change)
    assert isinstance(lane, PullLane)
    return lane


async def test_a_put_from_open_to_close() -> None:
    side, receiver = Side(), Receiver(Opened(committed=False), PullState(2, 64, 0.5))
    lane = await _open(_transport(receiver, side))
    lane.post(2)
    assert await lane.finish() is True
    assert lane.check() == PutProgress(2, 64)
    assert (side.serving, side.kept) == (1, True)
    await lane.close()
    await lane.close()
    assert (lane.num_bytes, lane.busy_s, side.serving) == (64, 0.5, 0)
    assert receiver.heard == [Ready(2), Last.FINISH]


@pytest.mark.parametrize("wanted", [False, True])
async def test_checksums_are_told_before_the_last_word_if_the_receiver_asks(wanted: bool) -> None:
    """Of the tokens of the push: here those after the first of a page, keys before values."""
    memory, part = make_probe_memory(), TokenRange(1, 4)
    layout, (page,) = memory.shape.layout, memory.pages[:, 3]
    page[:] = np.random.default_rng(1).integers(0, 255, page.size, np.uint8)
    tokens = page.reshape(2, layout.page_size, -1)[:, part.begin : part.end]
    receiver = Receiver(Opened(committed=False, checksums=wanted))
    request = PutRequest(THERE, memory, (3,), part, ADDRESS, Claim(part, 1, "w"))
    lane = await _transport(receiver).open(request, lambda: None)
    assert isinstance(lane, PullLane)
    assert await lane.finish()
    told = [Checksums((xxhash.xxh3_64_intdigest(tokens.tobytes()),))] if wanted else []
    assert receiver.heard == [*told, Last.FINISH]
    await lane.close()
    assert memory.memory is not None
    memory.memory.close()


async def test_what_is_asked_for_is_sent_from_the_pushs_own_pages() -> None:
    side, asked = Side(), TokenRange(1, 3)
    receiver = Receiver(Opened(committed=False))
    # Whoever asks for what is not computed yet, or was not offered, is cut off.
    receiver.asks = [Fetch(0, asked), Fetch(1, PART)]
    changed = asyncio.Event()
    lane = await _open(_transport(receiver, side), changed.set)
    lane.post(1)
    with pytest.raises(PeerLost, match="asked for what was not offered"):
        await _until_it_fails(lane, changed)
    # Keys and values of two tokens of one head of 16 bytes each.
    assert side.sent == [[ByteRange(16, 32), ByteRange(80, 32)]]
    assert not side.kept
    await lane.close()


async def test_what_is_committed_opens_no_lane() -> None:
    side = Side()
    request = PutRequest(THERE, _pool(), (0,), PART, ADDRESS, Claim(PART, 1, "w"))
    answer = await _transport(Receiver(Opened(committed=True)), side).open(request, lambda: None)
    assert (answer, side.serving) == (AlreadyCommitted.VALUE, 0)


@pytest.mark.parametrize(
    "refusal",
    [NoTransport("no"), TransportFailed("no"), RemoteError(Code.UNAVAILABLE, "UNAVAILABLE", "no")],
    ids=lambda error: error.reason,
)
async def test_a_receiver_that_cannot_leaves_the_push_to_another_transport(refusal: ServiceError) -> None:
    side = Side()
    with pytest.raises(TransportFailed):
        await _open(_transport(Receiver(refusal), side))
    assert side.serving == 0


async def test_other_refusals_are_the_pushs_own() -> None:
    with pytest.raises(NotDrained):
        await _open(_transport(Receiver(NotDrained("busy"))))


async def test_a_stream_that_ends_is_a_lost_peer() -> None:
    lane = await _open(_transport(Receiver(Opened(committed=False), PeerLost("gone"))))
    with pytest.raises(PeerLost):
        await lane.finish()
    with pytest.raises(PeerLost):
        lane.check()
    await lane.close()


async def test_a_silent_receiver_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane_module, "_FINISH_TIMEOUT_S", 0.01)
    monkeypatch.setattr(lane_module, "_LEAVE_TIMEOUT_S", 0.01)
    receiver = Receiver(Opened(committed=False))
    receiver.silent = True
    lane = await _open(_transport(receiver))
    with pytest.raises(PeerLost):
        await lane.finish()
    await lane.close()


async def test_who_is_within_reach() -> None:
    transport, pool = _transport(Receiver()), _pool()
    assert transport.refuses(pool, ADDRESS, THERE) is None
    for peer in (Peer("there:1", b"there", {}), Peer("there:1", b"there", {"nixl": "0"}), Peer("here:1", HERE, {})):
        assert isinstance(transport.refuses(pool, ADDRESS, peer), Unsupported)
    other = _pool(PageLayout(2, 1, 4, 8, Dtype.FLOAT32))
    assert isinstance(transport.refuses(other, ADDRESS, THERE), Unsupported)
    assert await transport.end_attempt(THERE, ADDRESS, Claim(PART, 1, "w"))


async def test_a_probe_serves_memory_of_no_engine_and_tells_the_receivers_figure() -> None:
    side = Side()
    transport = PullTransport(side, Receiver(3e9), HERE, "1", _pool())
    assert await transport.probe(THERE) == 3e9
    assert side.serving == 0
    for failure in (PeerLost("gone"), RemoteError(Code.UNIMPLEMENTED, "UNIMPLEMENTED", "an older service")):
        with pytest.raises(TransportFailed):
            await PullTransport(side, Receiver(failure), HERE, "1", _pool()).probe(THERE)
    assert side.serving == 0


async def test_what_is_not_probed() -> None:
    assert await PullTransport(Side(), Receiver(), HERE, "1").probe(THERE) is None
    assert await PullTransport(Side(), Receiver(), HERE, "2", _pool()).probe(THERE) is None
