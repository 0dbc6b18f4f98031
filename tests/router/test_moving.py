"""Drain by migration: sequences under way go on on another engine, with their KV, and the client notices nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio
import pytest
from microserve.router.v1 import admin_pb2

from services.protocol.errors import Code
from tests.fakes import PATIENCE_S, FakeEngine, FakeError, Fault
from tests.router.harness import PROMPT, Running, first_tokens, model, other_tokens, running

LENGTH = 40


class NotNow(FakeError):
    """What a sender may answer."""

    code = Code.PERMISSION_DENIED
    reason = "WRONG_SECRET"


async def begun(suite: Running, **options: Any) -> tuple[Any, list[int], FakeEngine]:
    """A call that gets no more than three tokens where it runs, these three, and the engine where that is."""
    faults = [Fault(after_tokens=3, times=1) for _ in suite.engines]
    for engine, fault in zip(suite.engines, faults, strict=True):
        engine.faults["StartGenerate"] = fault
    call = suite.stream(max_tokens=LENGTH, ignore_eos=True, **options)
    tasks = [asyncio.create_task(fault.reached.wait()) for fault in faults]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED, timeout=PATIENCE_S)
    for task in tasks:
        task.cancel()
    for engine in suite.engines:
        engine.faults.clear()
    [engine] = [each for each in suite.engines if each.sequences]
    return call, await first_tokens(call, 3), engine


async def drain(suite: Running, engine: FakeEngine, *, migrate: bool = True) -> None:
    address = engine.address
    await suite.admin.DrainEngine(admin_pb2.DrainEngineRequest(address=address, migrate=migrate))


async def test_a_sequence_goes_on_elsewhere_with_its_kv() -> None:
    async with running() as suite:
        call, before, source = await begun(suite)
        await drain(suite, source)
        after, last = await other_tokens(call)
        tokens = before + after
        assert tokens == model().generate(PROMPT, LENGTH)
        assert last.usage.output_token_count == LENGTH
        [target] = [each for each in suite.engines if each is not source]
        [send] = source.called("RemoteSend")
        assert (send.range.begin, send.range.end) == (0, (len(PROMPT) + 2) // 4 * 4)
        assert target.called("Release")[0].publish
        [start] = target.called("Session")
        assert list(start.prompt_token_ids) == [*PROMPT, *before]
        assert list((await suite.generate()).token_ids) == model().generate(PROMPT, 8)


@pytest.mark.parametrize("policy", ["data_parallel", "balanced:0.5", "adaptive"])
async def test_sampling_with_a_seed_goes_on_identically(policy: str) -> None:
    async with running() as suite:
        options: dict[str, Any] = {"seed": 7, "temperature": 1.0}
        want = list((await suite.generate(max_tokens=LENGTH, ignore_eos=True, **options)).token_ids)
        call, before, source = await begun(suite, policy=policy, **options)
        await drain(suite, source)
        assert before + (await other_tokens(call))[0] == want


async def test_many_sequences_move_at_once() -> None:
    async with running() as suite:
        for engine in suite.engines:
            engine.gate.clear()
        prompts = [tuple(range(5 + number, 50)) for number in range(8)]
        calls = [suite.stream(prompt, max_tokens=LENGTH, ignore_eos=True) for prompt in prompts]
        answers = asyncio.gather(*(other_tokens(call) for call in calls))
        await suite.first.until(lambda: len(suite.first.sequences) == 4)
        await drain(suite, suite.first)
        for engine in suite.engines:
            engine.gate.set()
        for prompt, (tokens, _) in zip(prompts, await answers, strict=True):
            assert tokens == model().generate(prompt, LENGTH)
        assert len(suite.engines[1].called("Session")) == 8


async def test_what_cannot_be_moved_is_computed_anew() -> None:
    async with running() as suite:
        call, before, source = await begun(suite)
        source.faults["RemoteSend"] = Fault(NotNow("no sending today"))
        await drain(suite, source)
        assert before + (await other_tokens(call))[0] == model().generate(PROMPT, LENGTH)


@pytest.mark.parametrize(("num_engines", "migrate"), [(1, True), (2, False)])
async def test_it_stays_where_no_other_engine_is_or_nobody_wants_it_moved(num_engines: int, migrate: bool) -> None:
    async with running(num_engines) as suite:
        suite.first.gate.clear()
        call = suite.stream(max_tokens=LENGTH, ignore_eos=True)
        await suite.first.until(lambda: suite.first.sequences)
        await drain(suite, suite.first, migrate=migrate)
        suite.first.gate.set()
        assert (await other_tokens(call))[0] == model().generate(PROMPT, LENGTH)
        assert [len(each.called("Session")) for each in suite.engines] == [1, 0][:num_engines]


async def test_an_engine_that_nobody_knows_cannot_be_drained() -> None:
    async with running() as suite:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await suite.admin.DrainEngine(admin_pb2.DrainEngineRequest(address="127.0.0.1:1", migrate=True))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
