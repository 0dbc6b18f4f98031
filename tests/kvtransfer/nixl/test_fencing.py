"""Bytes that come late never reach a page. Reads move when the test says so; everything else is the real service."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from microserve.kvtransfer.v1 import kvtransfer_pb2

from services.kvtransfer.convert import to_address
from services.kvtransfer.landing import Claim
from services.kvtransfer.transports.nixl.library import ReadState, Span
from services.kvtransfer.transports.nixl.source import Offer
from services.kvtransfer.transports.pull.checksums import host_checksum, layer_checksums
from services.kvtransfer.transports.pull.fetching import SourcePool
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
from services.protocol.errors import ServiceError
from services.protocol.ranges import TokenRange
from tests.kvtransfer.engine import FakeEngine
from tests.kvtransfer.nixl.fake_agent import FakeAgent, World, make_world
from tests.kvtransfer.oracle import expected
from tests.kvtransfer.port import PATIENCE_S, DirectPort
from tests.kvtransfer.streams import Watching

PAGES, TARGET = [1, 2], [4, 5]


class Scene:
    """A receiver on a service, and a sender's memory that it reads through agents of a fake world."""

    def __init__(self, world: World, port: DirectPort, sender: FakeEngine, receiver: FakeEngine) -> None:
        self.world, self.port, self.sender, self.receiver = world, port, sender, receiver
        self.source = FakeAgent(world, "source")
        self.before = receiver.memory.copy()
        self._pulls: list[Pull] = []

    @property
    def reader(self) -> FakeAgent:
        """The service's own agent."""
        return self.world.agents[self.receiver.epoch.hex()]

    async def opening(self, reservation: str = "r", **changes: Any) -> PullOpen:
        """An offer of the sender's pages for a window opened just now."""
        address = to_address(await self.receiver.grant(reservation, 0, 8, TARGET))
        memory = self.sender.memory
        offer = Offer(Span(memory.ctypes.data, memory.nbytes), self.source.metadata())
        source = SourcePool(address.layout, self.sender.shape.pages, offer.encode())
        part = TokenRange(0, 8)
        opening = PullOpen(address, Claim(part, 1, "w"), part, source, tuple(PAGES), "nixl")
        return dataclasses.replace(opening, **changes)

    def pull(self, opening: PullOpen) -> Pull:
        self._pulls.append(Pull(self, opening))
        return self._pulls[-1]

    async def close(self) -> None:
        """Ends the streams that are left: they would fail a minute later, in the middle of another test."""
        for pull in self._pulls:
            pull.task.cancel()
        await asyncio.gather(*(pull.task for pull in self._pulls), return_exceptions=True)

    def moved(self) -> Any:
        return expected(self.before, self.receiver, self.sender, 0, 8, PAGES, TARGET)


class Pull:
    """One stream to the service, read in the background."""

    def __init__(self, scene: Scene, opening: PullOpen) -> None:
        self._said: asyncio.Queue[Said | None] = asyncio.Queue()
        self.answers: list[Answer] = []
        self._news = asyncio.Condition()
        self.task = asyncio.create_task(self._run(scene, opening))

    def say(self, word: Said | None) -> None:
        self._said.put_nowait(word)

    async def until(self, wanted: Answer) -> None:
        async with asyncio.timeout(PATIENCE_S), self._news:
            await self._news.wait_for(lambda: wanted in self.answers or self.task.done())
        assert wanted in self.answers, self.task.exception()

    async def layers(self, count: int) -> None:
        async with asyncio.timeout(PATIENCE_S), self._news:
            await self._news.wait_for(
                lambda: any(isinstance(a, PullState) and a.layers_done >= count for a in self.answers)
            )

    async def fails(self) -> str:
        with pytest.raises(ServiceError) as caught:
            await asyncio.wait_for(self.task, PATIENCE_S)
        return caught.value.reason

    async def _run(self, scene: Scene, opening: PullOpen) -> None:
        async def said() -> AsyncIterator[Said]:
            while (word := await self._said.get()) is not None:
                yield word

        stream = scene.port.service.pull_sessions.serve(opening, said())
        try:
            async for answer in stream:
                self.answers.append(answer)
                async with self._news:
                    self._news.notify_all()
        finally:
            await stream.aclose()


@pytest_asyncio.fixture(loop_scope="session")
async def scene(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Scene]:
    world = make_world(monkeypatch)
    port = DirectPort(nixl_devices="lo")
    sender, receiver = FakeEngine(port, "p"), FakeEngine(port, "d")
    scene = Scene(world, port, await sender.start(seed=1), await receiver.start())
    yield scene
    await scene.close()
    sender.close()
    receiver.close()
    await port.close()


async def test_layers_are_read_as_they_become_ready(scene: Scene) -> None:
    pull = scene.pull(await scene.opening())
    await pull.until(Opened(committed=False))
    pull.say(Ready(2))
    await pull.layers(2)
    wanted = expected(scene.before, scene.receiver, scene.sender, 0, 8, PAGES, TARGET, layers=2)
    np.testing.assert_array_equal(scene.receiver.memory, wanted)
    pull.say(Ready(3))
    await pull.layers(3)
    pull.say(Last.FINISH)
    await pull.task
    assert pull.answers[-1] == Finished(committed=True)
    np.testing.assert_array_equal(scene.receiver.memory, scene.moved())


async def test_a_read_that_moves_does_not_hold_up_a_revoke_and_lands_nowhere(scene: Scene) -> None:
    scene.world.held = True
    pull = scene.pull(await scene.opening())
    pull.say(Ready(3))
    read = await scene.world.until_posted(1)
    # The peer may be stopped for as long as it likes: its bytes have no page to go to.
    await asyncio.wait_for(scene.receiver.revoke("r"), PATIENCE_S)
    assert await pull.fails() == "RESERVATION_GONE"
    for late in scene.world.reads:
        late.end()
    assert read in scene.world.reads
    np.testing.assert_array_equal(scene.receiver.memory, scene.before)


async def test_a_buffer_goes_to_nobody_while_its_read_moves(scene: Scene) -> None:
    scene.world.held = True
    first = scene.pull(await scene.opening("a"))
    first.say(Ready(3))
    late = await scene.world.until_posted(1)
    await scene.receiver.revoke("a")
    assert await first.fails() == "RESERVATION_GONE"
    held = {read.buffer for read in scene.world.reads}
    scene.world.held = False
    num_reads = len(scene.world.reads)
    second = scene.pull(await scene.opening("b"))
    second.say(Ready(3))
    await second.layers(3)
    late.move()
    assert held.isdisjoint(read.buffer for read in scene.world.reads[num_reads:])
    second.say(Last.FINISH)
    await second.task
    np.testing.assert_array_equal(scene.receiver.memory, scene.moved())


async def test_a_sender_that_leaves_commits_nothing_and_keeps_its_attempt(scene: Scene) -> None:
    scene.world.held = True
    opening = await scene.opening()
    pull = scene.pull(opening)
    pull.say(Ready(3))
    await scene.world.until_posted(1)
    pull.say(Last.LEAVE)
    await pull.task
    scene.world.held = False
    again = scene.pull(opening)
    again.say(Ready(3))
    await again.layers(3)
    again.say(Last.FINISH)
    await again.task
    assert again.answers[-1] == Finished(committed=True)


async def test_a_stream_that_breaks_ends_the_attempt(scene: Scene) -> None:
    opening = await scene.opening()
    pull = scene.pull(opening)
    await pull.until(Opened(committed=False))
    pull.say(None)
    assert await pull.fails() == "INVALID_REQUEST"
    assert await scene.pull(opening).fails() == "ATTEMPT_SUPERSEDED"
    # Cut otherwise, too: nobody is in the way.
    part = TokenRange(0, 4)
    other = dataclasses.replace(opening, claim=Claim(part, 1, "x"), part=part, source_page_ids=(1,))
    await scene.pull(other).until(Opened(committed=False))


async def test_a_read_that_fails_costs_its_buffer_and_the_connection(scene: Scene) -> None:
    scene.world.held = True
    pull = scene.pull(await scene.opening())
    pull.say(Ready(1))
    (await scene.world.until_posted(1)).end(ReadState.FAILED)
    assert await pull.fails() == "PEER_LOST"
    scene.world.held = False
    await scene.receiver.revoke("r")
    again = scene.pull(await scene.opening("again"))
    again.say(Ready(3))
    await again.layers(3)
    lost, *others = scene.world.reads
    assert lost.released
    assert all(read.buffer != lost.buffer for read in others)
    assert scene.reader.log == ["add source", "remove source", "add source"]
    again.say(Last.LEAVE)
    await again.task


async def test_finish_before_the_last_layer_commits_nothing(scene: Scene) -> None:
    pull = scene.pull(await scene.opening())
    pull.say(Ready(2))
    await pull.layers(2)
    pull.say(Last.FINISH)
    assert await pull.fails() == "INVALID_REQUEST"


def sums(scene: Scene, opening: PullOpen) -> tuple[int, ...]:
    """What an honest sender says."""
    pool = scene.port.service._pools.find(scene.sender.pool_id)
    return tuple(layer_checksums(host_checksum, pool, opening.source_page_ids, opening.part))


@pytest.mark.parametrize("part", [TokenRange(0, 8), TokenRange(1, 7), TokenRange(2, 3)])
async def test_checksums_of_what_arrived_whole(scene: Scene, part: TokenRange) -> None:
    pages = PAGES[: len(part.page_indices(4))]
    opening = await scene.opening(part=part, claim=Claim(part, 1, "w"), source_page_ids=tuple(pages), checksums=True)
    pull = scene.pull(opening)
    await pull.until(Opened(committed=False, checksums=True))
    pull.say(Ready(3))
    await pull.layers(3)
    pull.say(Checksums(sums(scene, opening)))
    pull.say(Last.FINISH)
    await pull.task
    assert pull.answers[-1] == Finished(committed=True)


async def test_a_byte_that_arrives_otherwise_is_data_loss_and_nothing_counts(scene: Scene) -> None:
    opening = await scene.opening(checksums=True)
    honest = sums(scene, opening)
    pull = scene.pull(opening)
    pull.say(Ready(2))
    await pull.layers(2)
    scene.sender.memory[-1::-64] ^= 1  # after two layers were fetched
    pull.say(Ready(3))
    await pull.layers(3)
    pull.say(Checksums(honest))
    pull.say(Last.FINISH)
    assert await pull.fails() == "CHECKSUM_MISMATCH"
    # The attempt is over: nobody is in the way of another sender, who writes all of it again.
    again = dataclasses.replace(opening, claim=Claim(opening.part, 1, "x"))
    assert await scene.pull(again).fails() == "ATTEMPT_SUPERSEDED"
    again = dataclasses.replace(opening, claim=Claim(opening.part, 2, "x"))
    other = scene.pull(again)
    await other.until(Opened(committed=False, checksums=True))
    other.say(Ready(3))
    await other.layers(3)
    other.say(Checksums(sums(scene, again)))
    other.say(Last.FINISH)
    await other.task
    assert other.answers[-1] == Finished(committed=True)
    np.testing.assert_array_equal(scene.receiver.memory, scene.moved())


@pytest.mark.parametrize("told", [None, (), (1, 2)], ids=["none", "empty", "too_few"])
async def test_who_does_not_tell_checksums_commits_nothing(scene: Scene, told: tuple[int, ...] | None) -> None:
    pull = scene.pull(await scene.opening(checksums=True))
    pull.say(Ready(3))
    await pull.layers(3)
    if told is not None:
        pull.say(Checksums(told))
    pull.say(Last.FINISH)
    assert await pull.fails() == "INVALID_REQUEST"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"source": "forged"}, "TRANSPORT_FAILED"),
        ({"source_page_ids": (1,)}, "INVALID_PAGES"),
        ({"source_page_ids": (1, 99)}, "INVALID_PAGES"),
        ({"transport": "other"}, "NO_TRANSPORT"),
        ({"secret": bytes(16)}, "WRONG_SECRET"),
        ({"part": TokenRange(0, 0), "source_page_ids": ()}, "INVALID_REQUEST"),
        ({"part": TokenRange(4, 12)}, "OUTSIDE_WINDOW"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
async def test_refusals(scene: Scene, change: dict[str, Any], reason: str) -> None:
    opening = await scene.opening()
    secret = change.pop("secret", None)
    if secret is not None:
        change["address"] = dataclasses.replace(opening.address, secret=secret)
    if change.get("source") == "forged":
        change["source"] = dataclasses.replace(opening.source, offer=b"MSN1" + bytes(20))
    assert await scene.pull(dataclasses.replace(opening, **change)).fails() == reason
    # Nothing of the offer reached the library before the right to write was shown.
    assert scene.receiver.epoch.hex() not in scene.world.agents or not scene.reader.peers
    assert scene.world.reads == []


async def test_another_layout_is_refused(scene: Scene) -> None:
    opening = await scene.opening()
    source = dataclasses.replace(opening.source, layout=dataclasses.replace(opening.source.layout, page_size=8))
    assert await scene.pull(dataclasses.replace(opening, source=source)).fails() == "LAYOUT_MISMATCH"


async def test_what_is_committed_is_not_read_again(scene: Scene) -> None:
    opening = await scene.opening()
    pull = scene.pull(opening)
    pull.say(Ready(3))
    await pull.layers(3)
    pull.say(Last.FINISH)
    await pull.task
    num_reads = len(scene.world.reads)
    again = scene.pull(opening)
    await again.task
    assert again.answers == [Opened(committed=True)]
    assert len(scene.world.reads) == num_reads


async def test_a_sender_that_leaves_as_it_is_let_in(scene: Scene) -> None:
    """The stream is closed with its first answer under way: the attempt ends all the same."""
    opening = await scene.opening()
    watch = Watching(scene.receiver.watch())

    async def said() -> AsyncIterator[Said]:
        await asyncio.Event().wait()
        yield Last.LEAVE

    stream = scene.port.service.pull_sessions.serve(opening, said())
    assert await anext(stream) == Opened(committed=False)
    await watch.until(lambda events: events["r"].state == kvtransfer_pb2.GRANT_STATE_WRITING)
    await stream.aclose()
    await watch.until(lambda events: events["r"].state == kvtransfer_pb2.GRANT_STATE_OPEN)
    await watch.close()
