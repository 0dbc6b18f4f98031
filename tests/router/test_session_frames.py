"""In which order a frame of an engine, which has something of every sequence, is passed on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from microserve.engine.v1 import engine_pb2

from services.router.fleet.session import Sequence, Session
from services.router.values import Chunk
from tests.fakes import PATIENCE_S
from tests.router.test_session import session_with


class _Engine:
    """A call that takes every command and says what it is told to."""

    def __init__(self) -> None:
        self._frames: asyncio.Queue[engine_pb2.SessionResponse] = asyncio.Queue()

    def say(self, *names: str) -> None:
        """A frame with a token for each of these sequences."""
        frame = engine_pb2.SessionResponse()
        for name in names:
            output = frame.outputs.add(request_id=name)
            output.output.token_ids.append(7)
        self._frames.put_nowait(frame)

    async def write(self, command: engine_pb2.SessionRequest) -> None:
        pass

    async def __aiter__(self) -> AsyncIterator[engine_pb2.SessionResponse]:
        while True:
            yield await self._frames.get()

    def cancel(self) -> None:
        pass


class _Client:
    """Notes whose tokens come, and when it has had a turn of the loop to send what came."""

    def __init__(self, session: Session, *names: str) -> None:
        self.seen: list[str] = []
        self._came, self._changed = asyncio.Event(), asyncio.Event()
        self._readers = [asyncio.create_task(self._start(session, name).each(self._noting(name))) for name in names]
        self._writer = asyncio.create_task(self._write())

    async def until(self, seen: list[str]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while self.seen != seen:
                self._changed.clear()
                await self._changed.wait()

    async def stop(self) -> None:
        tasks = [*self._readers, self._writer]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @staticmethod
    def _start(session: Session, name: str) -> Sequence:
        start = engine_pb2.StartGenerateRequest(owner_id="o", request_id=name)
        return session.start(engine_pb2.SessionRequest(start=start))

    def _noting(self, name: str) -> Callable[[Chunk], bool]:
        def note(_: Chunk) -> bool:
            self._note(name)
            self._came.set()
            return True

        return note

    async def _write(self) -> None:
        while True:
            await self._came.wait()
            self._came.clear()
            self._note("sent")

    def _note(self, what: str) -> None:
        self.seen.append(what)
        self._changed.set()


async def test_first_tokens_are_on_their_way_before_the_rest_of_their_frame_is_looked_at() -> None:
    engine = _Engine()
    session = session_with(lambda: engine)  # type: ignore[arg-type,return-value]
    client = _Client(session, "a", "b", "c", "d")
    engine.say("a", "b")
    await client.until(["a", "b", "sent"])
    engine.say("a", "c", "b", "d")
    await client.until(["a", "b", "sent", "c", "d", "sent", "a", "b", "sent"])
    engine.say("d", "a", "c", "b")
    await client.until(["a", "b", "sent", "c", "d", "sent", "a", "b", "sent", "d", "a", "c", "b", "sent"])
    await client.stop()
    await session.close()
