"""The router's client of one engine: which way its verbs go, and what becomes of them when the stream breaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio
import pytest

from services.protocol.errors import Code, ServiceError
from services.router.fleet.client import EngineClient
from services.router.fleet.port import ReservedKv
from services.router.request import ModelKey, PolicyRequest
from services.router.values import Sampling
from services.rpc.channel import make_channel
from tests.fakes import FakeEngine, FakeError, FakeModel, Fault
from tests.router.vocabularies import byte_level, files

PROMPT = tuple(range(20, 60))
END = 39


@asynccontextmanager
async def connected(version: str = "1.1") -> AsyncIterator[tuple[FakeEngine, EngineClient, grpc.aio.Channel]]:
    engine = FakeEngine(FakeModel(files(byte_level())))
    engine.contract_version = version
    channel = make_channel(await engine.start())
    client = EngineClient("a", channel, "router", max_buffered=64)
    try:
        await client.get_info()
        yield engine, client, channel
    finally:
        await client.close()
        await engine.stop()


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
