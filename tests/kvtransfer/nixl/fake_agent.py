"""NIXL without NIXL: agents of one process whose reads move when the test says so."""

from __future__ import annotations

import asyncio
import ctypes
import threading
from collections.abc import Sequence

import pytest

from services.kvtransfer.transports.nixl import library
from services.kvtransfer.transports.nixl.library import NixlFailed, ReadState, Span
from tests.kvtransfer.port import PATIENCE_S


class FakeRead:
    """A posted read; see library.Read."""

    def __init__(self, world: World, local: Sequence[Span], remote: Sequence[Span]) -> None:
        self._world, self._spans = world, tuple(zip(local, remote, strict=True))
        self.buffer = local[0].address
        self.released = False
        self._state = ReadState.MOVING

    def state(self) -> ReadState:
        return self._state

    def release(self) -> None:
        assert self._state is not ReadState.MOVING, "a read that moves must not be released"
        self.released = True

    def move(self) -> None:
        """The bytes come."""
        for local, remote in self._spans:
            assert local.num_bytes == remote.num_bytes
            ctypes.memmove(local.address, remote.address, local.num_bytes)

    def end(self, state: ReadState = ReadState.DONE) -> None:
        if state is ReadState.DONE:
            self.move()
        self._state = state


class World:
    """All agents, and every read in the order of posting. With `held`, reads wait for the test."""

    def __init__(self) -> None:
        self.agents: dict[str, FakeAgent] = {}
        self.reads: list[FakeRead] = []
        self.held = False
        self._posted = asyncio.Condition()
        self._loop = asyncio.get_running_loop()

    def posted(self, read: FakeRead) -> None:
        self.reads.append(read)
        if not self.held:
            read.end()
        self._loop.call_soon_threadsafe(lambda: asyncio.ensure_future(self._wake()))

    async def until_posted(self, count: int) -> FakeRead:
        """The read of that number, once it is posted."""
        async with asyncio.timeout(PATIENCE_S), self._posted:
            await self._posted.wait_for(lambda: len(self.reads) >= count)
        return self.reads[count - 1]

    async def _wake(self) -> None:
        async with self._posted:
            self._posted.notify_all()


class FakeAgent:
    """See library.Agent."""

    def __init__(self, world: World, name: str) -> None:
        self._world, self.name = world, name
        self.peers: list[str] = []
        self.log: list[str] = []
        self.registered: list[Span] = []
        self.thread = threading.get_ident()
        world.agents[name] = self

    def register(self, span: Span) -> None:
        self._same_thread()
        self.registered.append(span)

    def metadata(self) -> bytes:
        return self.name.encode()

    def add_peer(self, metadata: bytes) -> str:
        self._same_thread()
        name = metadata.decode(errors="replace")
        if name not in self._world.agents:
            raise NixlFailed("not the metadata of an agent")
        assert name not in self.peers, "a peer that is known must be removed first"
        self.peers.append(name)
        self.log.append(f"add {name}")
        return name

    def remove_peer(self, name: str) -> None:
        self._same_thread()
        self.peers.remove(name)
        self.log.append(f"remove {name}")

    def read(self, peer: str, local: Sequence[Span], remote: Sequence[Span]) -> FakeRead:
        self._same_thread()
        assert peer in self.peers
        read = FakeRead(self._world, local, remote)
        self._world.posted(read)
        return read

    def progress(self) -> None:
        self._same_thread()

    def close(self) -> None:
        self._same_thread()

    def _same_thread(self) -> None:
        assert threading.get_ident() == self.thread, "an agent belongs to one thread"


def make_world(monkeypatch: pytest.MonkeyPatch) -> World:
    """Puts a world in the place of the library."""
    world = World()
    monkeypatch.setattr(library, "load", lambda devices: None)
    monkeypatch.setattr(library, "NixlAgent", lambda module, name: FakeAgent(world, name))
    return world
