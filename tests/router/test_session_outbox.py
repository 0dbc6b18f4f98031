"""What waits for an engine that takes no commands: nothing of those who have left, and nothing twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import grpc.aio
import pytest
from microserve.engine.v1 import engine_pb2, engine_pb2_grpc

from services.router.errors import EngineDrained
from services.router.fleet.session import Sequence, Session
from services.router.values import Chunk, FinishReason
from tests.fakes import PATIENCE_S, FakeEngine, FakeModel
from tests.router.harness import running, script
from tests.router.test_session import END, PROMPT, connected, request, session_with

NOT_BEGUN = Chunk(finish=FinishReason.CANCELLED)


class HeldCall:
    """A stream that writes nothing before `gate` is set."""

    def __init__(self, call: grpc.aio.StreamStreamCall) -> None:
        self._call = call
        self.reached, self.gate = asyncio.Event(), asyncio.Event()

    def __aiter__(self) -> AsyncIterator[engine_pb2.SessionResponse]:
        return aiter(self._call)

    async def write(self, command: engine_pb2.SessionRequest) -> None:
        self.reached.set()
        await self.gate.wait()
        await self._call.write(command)

    def cancel(self) -> None:
        self._call.cancel()


def held_session(channel: grpc.aio.Channel) -> tuple[HeldCall, Session]:
    call = HeldCall(engine_pb2_grpc.EngineServiceStub(channel).Session())
    return call, session_with(lambda: call)  # type: ignore[arg-type,return-value]


def start(session: Session, name: str) -> Sequence:
    message = engine_pb2.StartGenerateRequest(owner_id="o", request_id=name, prompt_token_ids=PROMPT)
    message.sampling.max_tokens = 3
    return session.start(engine_pb2.SessionRequest(start=message))


def ask(session: Session, name: str) -> asyncio.Task[engine_pb2.PrepRecvResponse]:
    message = engine_pb2.PrepRecvRequest(owner_id="o", request_id=name, prompt_token_ids=PROMPT, end=END)
    return asyncio.create_task(session.prep_recv(message, PATIENCE_S))


async def rest(sequence: Sequence) -> list[Chunk]:
    chunks = []
    while (chunk := await sequence.take()) is not None:
        chunks.append(chunk)
    return chunks


async def test_who_leaves_before_the_verb_is_written_takes_it_back() -> None:
    async with connected() as (engine, _, channel):
        call, session = held_session(channel)
        first = ask(session, "first")
        await call.reached.wait()
        left = ask(session, "left")
        await asyncio.sleep(0)  # its turn: it waits behind the first one
        left.cancel()
        await asyncio.wait({left})
        call.gate.set()
        await first
        await ask(session, "next")
        assert [verb.request_id for verb in engine.called("SessionVerb")] == ["first", "next"]
        assert engine.called("Cancel") == []
        await session.close()


async def test_a_sequence_that_is_cancelled_before_it_is_written_never_is() -> None:
    async with connected() as (engine, _, channel):
        call, session = held_session(channel)
        first, left, away = (start(session, name) for name in ("first", "left", "away"))
        for _ in range(2):
            left.cancel()
        away.take_away(EngineDrained("a"))
        assert await rest(left) == [NOT_BEGUN]
        with pytest.raises(EngineDrained):
            await away.take()
        last = start(session, "last")
        call.gate.set()
        assert [(await rest(each))[-1].finish for each in (first, last)] == [FinishReason.LENGTH] * 2
        assert [each.request_id for each in engine.called("Session")] == ["first", "last"]
        assert engine.called("Cancel") == []
        await session.close()


async def test_one_that_is_cancelled_again_and_again_is_cancelled_once() -> None:
    async with connected() as (engine, _, channel):
        engine.gate.clear()  # no sequence gets on
        call, session = held_session(channel)
        sequence = start(session, "first")
        await call.reached.wait()
        for _ in range(3):
            sequence.cancel()
        call.gate.set()
        (chunk,) = await rest(sequence)
        assert chunk.finish is FinishReason.CANCELLED
        assert chunk.timing is not None
        assert [each.request_id for each in engine.called("Cancel")] == ["first"]
        await session.close()


class StandsStill(FakeEngine):
    """Takes no command before `may_read` is set."""

    def __init__(self, model: FakeModel) -> None:
        super().__init__(replace(model, max_context=100_000))
        self.may_read = asyncio.Event()

    async def Session(
        self, requests: AsyncIterator[engine_pb2.SessionRequest], context: object
    ) -> AsyncIterator[engine_pb2.SessionResponse]:
        await self.may_read.wait()
        async for response in super().Session(requests, context):
            yield response


async def test_an_engine_that_stood_still_is_sent_nothing_of_those_who_left() -> None:
    """Over a real connection, which holds some of them and not the rest."""
    async with connected(kind=StandsStill) as (engine, client, _):
        assert isinstance(engine, StandsStill)
        engine.gate.clear()
        long = replace(request(), prompt=(200,) * 50_000)
        left = [client.start_generate(str(number), long, 0, None) for number in range(60)]
        for _ in range(20):  # turns of the loop, in each of which one at most is written
            await asyncio.sleep(0)
        for sequence in left:
            sequence.cancel()
        engine.may_read.set()
        ends = {sequence.request_id: (await rest(sequence))[-1] for sequence in left}
        assert {end.finish for end in ends.values()} == {FinishReason.CANCELLED}
        told = [name for name, end in ends.items() if end.timing is not None]
        assert 0 < len(told) < len(left)
        assert [each.request_id for each in engine.called("Session")] == told
        assert [each.request_id for each in engine.called("Cancel")] == told


HOLDS_TWO = """
import asyncio
from dataclasses import replace

async def policy(request, fleet):
    here, other = fleet.engines
    async with other.prep_recv(request, end=50) as kv:
        await here.remote_send(request, kv)
        held = [
            asyncio.ensure_future(anext(other.start_generate(replace(request, cache_salt="held")))),
            asyncio.ensure_future(anext(other.start_generate(request, begin=50, kv=kv))),
        ]
        async for chunk in here.start_generate(request):
            yield chunk
        assert (await held[1]).finish is not None
"""


async def test_a_reservation_whose_sequence_was_taken_back_is_released(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stop string ends the answer of one engine while the other one's sequence waits for room."""
    program = tmp_path / "holds_two.py"
    program.write_text(HOLDS_TWO)
    write = grpc.aio._call.StreamStreamCall.write
    released = asyncio.Event()

    async def held_write(call: grpc.aio.StreamStreamCall, command: object) -> None:
        if isinstance(command, engine_pb2.SessionRequest) and command.start.cache_salt:
            await released.wait()
        await write(call, command)

    monkeypatch.setattr(grpc.aio._call.StreamStreamCall, "write", held_write)
    model = script("never say stop again")
    async with running(2, fake_model=model, policy="holds_two", policy_file=(program,)) as suite:
        answer = await suite.generate(stop=["stop"], max_tokens=40)
        assert answer.text == "never say "
        released.set()
        await suite.idle()
        assert sum(len(engine.called("Release")) for engine in suite.engines) == 1
