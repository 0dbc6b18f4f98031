"""The router's client of one engine: which way its verbs go, and what becomes of them when the stream breaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc.aio
import pytest
from microserve.engine.v1 import engine_pb2, engine_pb2_grpc

from services.protocol.errors import Code, ServiceError
from services.router.errors import InvalidRequest
from services.router.fleet.client import EngineClient
from services.router.fleet.port import ReservedKv
from services.router.fleet.session import Session, SessionCall
from services.router.request import ModelKey, PolicyRequest
from services.router.values import Guide, Sampling
from services.rpc.channel import MAX_MESSAGE_BYTES, make_channel
from tests.fakes import PATIENCE_S, FakeEngine, FakeError, FakeModel, Fault
from tests.router.vocabularies import byte_level, files

PROMPT = tuple(range(20, 60))
END = 39


@asynccontextmanager
async def connected(
    version: str = "1.1",
    *,
    kind: type[FakeEngine] = FakeEngine,
    limit: int = MAX_MESSAGE_BYTES,
    engines_limit: int = 0,
    told: bool = False,
) -> AsyncIterator[tuple[FakeEngine, EngineClient, grpc.aio.Channel]]:
    """`limit`, of the router's messages; `engines_limit`, of the engine's, 0: the same; `told`, whether it says so."""
    engine = kind(FakeModel(files(byte_level())))
    engine.max_message_bytes = engines_limit if told else 0
    engine.contract_version = version
    channel = make_channel(await engine.start(max_message_bytes=engines_limit or limit), max_message_bytes=limit)
    client = EngineClient("a", channel, "router", max_buffered=64, max_message_bytes=limit)
    try:
        await client.get_info()
        yield engine, client, channel
    finally:
        await client.close()
        await engine.stop()


def session_with(open_call: Callable[[], SessionCall], limit: int = MAX_MESSAGE_BYTES) -> Session:
    return Session("a", open_call, pytest.fail, max_buffered=64, max_message_bytes=limit)


def request(timeout_s: float = 60.0) -> PolicyRequest:
    deadline = asyncio.get_running_loop().time() + timeout_s
    return PolicyRequest("r", ModelKey("m", b"", b""), PROMPT, Sampling(max_tokens=3), deadline=deadline)


async def prep(client: EngineClient, call_id: str = "p", timeout_s: float = 60.0) -> ReservedKv:
    return await client.prep_recv(call_id, request(timeout_s), END, 0.0)


@pytest.mark.parametrize(("version", "verbs"), [("1.0", 0), ("1.1", 2), ("1.10", 2)])
async def test_verbs_go_over_the_session_of_an_engine_that_takes_them_there(version: str, verbs: int) -> None:
    async with connected(version) as (engine, client, _):
        kv = await prep(client)
        timing = await client.remote_send("s", request(), kv.window, kv, 1)
        assert (kv.window.begin, kv.window.end, timing.transferred_tokens) == (0, END, END)
        sequence = client.start_generate("g", request(), END, kv)
        tokens: list[int] = []
        while (chunk := await sequence.take()) is not None:
            tokens += chunk.token_ids
        assert len(tokens) == 3
        assert len(engine.called("SessionVerb")) == verbs
        assert len(engine.called("PrepRecv")) == len(engine.called("RemoteSend")) == 1


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_errors_are_the_engines_either_way(version: str) -> None:
    async with connected(version) as (engine, client, _):
        engine.faults["PrepRecv"] = Fault(FakeError("full", retry_delay_s=2.0))
        with pytest.raises(ServiceError) as caught:
            await prep(client)
        assert (caught.value.code, caught.value.reason) == (Code.RESOURCE_EXHAUSTED, "NO_PAGES")
        assert caught.value.retry_delay_s == 2.0


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_an_engine_that_does_not_answer_is_not_waited_for_longer_than_allowed(version: str) -> None:
    async with connected(version) as (engine, client, _):
        engine.faults["PrepRecv"] = Fault()
        with pytest.raises(ServiceError) as caught:
            await prep(client, timeout_s=0.2)
        assert (caught.value.code, caught.value.reason) == (Code.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")


async def test_who_leaves_cancels_the_verb_on_the_engine() -> None:
    async with connected() as (engine, client, _):
        engine.faults["PrepRecv"] = fault = Fault()
        asking = asyncio.create_task(prep(client, "left"))
        await fault.reached.wait()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        del engine.faults["PrepRecv"]
        await prep(client, "next")  # the stream goes on, and what came before has been read by now
        assert [cancel.request_id for cancel in engine.called("Cancel")] == ["left"]


async def test_a_stream_that_breaks_fails_its_verbs_and_the_next_one_opens_another() -> None:
    async with connected() as (engine, client, channel):
        engine.faults["PrepRecv"] = fault = Fault()
        waiting = [asyncio.create_task(prep(client, name)) for name in "ab"]
        await fault.reached.wait()
        address = engine.address
        await engine.stop()
        for task in waiting:
            with pytest.raises(ServiceError) as caught:
                await task
            assert (caught.value.code, caught.value.reason) == (Code.UNAVAILABLE, "ENGINE_LOST")
        del engine.faults["PrepRecv"]
        await engine.start(address)
        await channel.channel_ready()
        assert (await prep(client, "c")).window.end == END


async def test_closing_fails_what_is_open() -> None:
    async with connected() as (engine, client, _):
        engine.faults["PrepRecv"] = fault = Fault()
        waiting = asyncio.create_task(prep(client))
        await fault.reached.wait()
        await client.close()
        with pytest.raises(ServiceError) as caught:
            await waiting
        assert caught.value.reason == "ENGINE_LOST"


@pytest.mark.parametrize("limits", [{"limit": 10_000}, {"engines_limit": 10_000, "told": True}])
async def test_a_verb_that_is_too_large_to_send_fails_alone(limits: dict[str, int]) -> None:
    async with connected(**limits) as (engine, client, _):
        engine.gate.clear()
        innocent = client.start_generate("innocent", request(), 0, None)
        guided = replace(request(), sampling=Sampling(guide=Guide("json_schema", ("x" * 10_000,))))
        with pytest.raises(InvalidRequest):
            client.start_generate("s", guided, 0, None)
        with pytest.raises(InvalidRequest):
            await client.prep_recv("p", replace(request(), prompt=(200,) * 5_000), END, 0.0)
        engine.gate.set()
        while await innocent.take() is not None:
            pass


async def test_a_verb_that_is_just_not_too_large_is_sent() -> None:
    message = engine_pb2.StartGenerateRequest(owner_id="o", request_id="g", prompt_token_ids=100 * PROMPT)
    command = engine_pb2.SessionRequest(start=message)
    limit = command.ByteSize()
    async with connected(limit=limit) as (_, _, channel):
        session = session_with(engine_pb2_grpc.EngineServiceStub(channel).Session, limit)
        assert await session.start(command).take() is not None
        await session.close()


async def test_what_breaks_the_stream_is_no_single_verbs_error() -> None:
    async with connected(engines_limit=10_000) as (engine, client, _):
        engine.faults["PrepRecv"] = fault = Fault()
        innocent = asyncio.create_task(prep(client))
        await fault.reached.wait()
        large = client.start_generate("large", replace(request(), prompt=(20,) * 20_000), 0, None)
        for ask in (innocent, asyncio.create_task(large.take())):
            with pytest.raises(ServiceError) as caught:
                await ask
            assert (caught.value.code, caught.value.reason) == (Code.UNAVAILABLE, "ENGINE_LOST")


async def test_a_stream_is_closed_in_the_turn_that_opened_it() -> None:
    async with connected() as (_, client, _):
        sequence = client.start_generate("g", request(), 0, None)
        async with asyncio.timeout(PATIENCE_S):
            await client.close()
        with pytest.raises(ServiceError) as caught:
            await sequence.take()
        assert caught.value.reason == "ENGINE_LOST"


class _Recorder:
    """A call that takes one command for as long as `gate` is shut, and answers nothing."""

    def __init__(self) -> None:
        self.written: list[str] = []
        self.gate = asyncio.Event()

    async def write(self, command: engine_pb2.SessionRequest) -> None:
        self.written.append(command.start.request_id)
        await self.gate.wait()

    def __aiter__(self) -> _Recorder:
        return self

    async def __anext__(self) -> engine_pb2.SessionResponse:
        await asyncio.Event().wait()
        raise StopAsyncIteration

    def cancel(self) -> None:
        self.gate.set()


async def test_a_command_is_written_in_the_turn_that_gives_it_and_others_follow_in_order() -> None:
    call = _Recorder()
    session = session_with(lambda: call)  # type: ignore[arg-type,return-value]
    names = ["first", "second", "third"]
    for name in names:
        session.start(engine_pb2.SessionRequest(start=engine_pb2.StartGenerateRequest(owner_id="o", request_id=name)))
        assert call.written == ["first"]
    call.gate.set()
    for _ in range(4):  # turns of the loop, in which nothing else is to be waited for
        await asyncio.sleep(0)
    assert call.written == names
    session.start(engine_pb2.SessionRequest(start=engine_pb2.StartGenerateRequest(owner_id="o", request_id="later")))
    assert call.written == [*names, "later"]
    await session.close()


class AnswersAnyway(FakeEngine):
    """A cancel always reaches it too late, once `asked` is set; it answers when `may_answer` is."""

    def __init__(self, model: FakeModel) -> None:
        super().__init__(model)
        self.asked, self.may_answer = asyncio.Event(), asyncio.Event()

    async def _answer(self, *arguments: Any) -> None:
        self.asked.set()
        self.late = asyncio.create_task(self._answer_late(*arguments))
        await asyncio.shield(self.late)

    async def _answer_late(self, *arguments: Any) -> None:
        await self.may_answer.wait()
        await super()._answer(*arguments)


async def test_a_reservation_whose_asker_has_left_is_aborted_when_it_comes() -> None:
    async with connected(kind=AnswersAnyway) as (engine, client, _):
        assert isinstance(engine, AnswersAnyway)
        asking = asyncio.create_task(prep(client, "left"))
        await engine.asked.wait()
        asking.cancel()
        await asyncio.wait({asking})
        await client.abort("left", timeout_s=PATIENCE_S)  # as the router does, and too early
        engine.may_answer.set()
        await engine.until(lambda: len(engine.called("Abort")) == 2)
        await engine.idle()
