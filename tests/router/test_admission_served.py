"""Admission as clients of a whole router see it."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import replace

import grpc.aio
import openai
import pytest
from microserve.router.v1 import admin_pb2, router_pb2

from services.router.admission.line import Line, Turn
from services.router.admission.ticket import Capacity, Ticket
from services.router.asking import Ask, Tokens
from services.router.metrics import REFUSALS
from services.router.service import GenerationService
from services.router.traces import Traces
from services.router.values import Sampling, Usage
from services.rpc.status import from_rpc_error
from tests.fakes import PATIENCE_S, FakeEngine, Fault
from tests.router.harness import PROMPT, Running, failing, model, request, running


def small_engines(names: str) -> list[FakeEngine]:
    """One sequence at a time each."""
    peers: dict[str, FakeEngine] = {}
    return [FakeEngine(model(), name, peers=peers, max_batch_size=1) for name in names]


async def waiting(suite: Running, number: int) -> None:
    """Until so many requests wait for their turn."""
    admission = suite.router.admission
    async with asyncio.timeout(60):
        while admission.num_waiting != number:
            await asyncio.wait_for(suite.admin.ListEngines(admin_pb2.ListEnginesRequest()), 60)


async def test_what_the_engines_cannot_take_waits_in_the_router() -> None:
    async with running(engines=small_engines("ab")) as suite:
        for engine in suite.engines:
            engine.gate.clear()
        asked = [asyncio.create_task(suite.generate()) for _ in range(6)]
        await waiting(suite, 4)
        first, second = suite.engines
        await first.until(lambda: first.sequences)
        await second.until(lambda: second.sequences)
        assert [len(engine.sequences) for engine in suite.engines] == [1, 1]
        for engine in suite.engines:
            engine.gate.set()
        for answer in await asyncio.gather(*asked):
            assert list(answer.token_ids) == model().generate(PROMPT, 8)


async def test_a_turn_that_does_not_come_is_refused_with_advice() -> None:
    before = REFUSALS.labels("normal", "queue_time")._value.get()
    async with running(engines=small_engines("a"), queue_timeout=0.1) as suite:
        suite.first.gate.clear()
        call = suite.stream()
        await suite.first.until(lambda: suite.first.sequences)
        with failing("RESOURCE_EXHAUSTED", "OVERLOADED") as caught:
            await suite.generate()
        assert caught.value.retry_delay_s
        call.cancel()
    assert REFUSALS.labels("normal", "queue_time")._value.get() == before + 1


async def test_what_engines_have_ended_keeps_nobody_waiting_whatever_its_reader_takes() -> None:
    async with running(engines=small_engines("a"), queue_timeout=PATIENCE_S) as suite:
        router = suite.router
        service = GenerationService(
            router.registry, router.catalogue, router._host, Traces(1), admission=router.admission, max_request_s=600
        )
        async with aclosing(service.generate(Ask(Tokens(PROMPT), Sampling(max_tokens=8)))) as unread:
            answer = await anext(unread)
            async with asyncio.timeout(PATIENCE_S / 2):
                await suite.generate()
            token_ids = list(answer.token_ids)
            async for answer in unread:
                token_ids += answer.token_ids
        assert token_ids == model().generate(PROMPT, 8)
        assert answer.usage == Usage(len(PROMPT), 0, 8)


async def test_a_client_that_leaves_the_queue_leaves_nothing_behind() -> None:
    async with running(engines=small_engines("a")) as suite:
        suite.first.gate.clear()
        running_call = suite.stream()
        await suite.first.until(lambda: suite.first.sequences)
        waiting_call = suite.stream()
        await waiting(suite, 1)
        waiting_call.cancel()
        await waiting(suite, 0)
        suite.first.gate.set()
        assert [piece async for piece in running_call]
        assert len(suite.first.called("StartGenerate")) == 1


async def test_an_engine_that_joins_gives_room() -> None:
    async with running(engines=small_engines("a")) as suite:
        suite.first.gate.clear()
        call = suite.stream()
        await suite.first.until(lambda: suite.first.sequences)
        asked = asyncio.create_task(suite.generate())
        await waiting(suite, 1)
        [new] = small_engines("b")
        await new.start()
        suite.router.membership.add(new.address)
        assert (await asked).legs[0].engine == "b"
        suite.first.gate.set()
        call.cancel()
        await new.stop()


async def test_sequences_of_another_router_count(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(engines=small_engines("a"), queue_timeout=0.2) as suite:
        suite.first.sequences.add("somebody else's")
        member = suite.router.registry.members[suite.first.address]
        reported = asyncio.Event()
        suite.router.registry.on_load(reported.set, lambda: True)
        async with asyncio.timeout(60):
            while member.others.sequences != 1:  # one report alone may only lag behind
                suite.first._notify()
                await reported.wait()
                reported.clear()
        with failing("RESOURCE_EXHAUSTED", "OVERLOADED"):
            await suite.generate()
        admission = suite.router.admission
        monkeypatch.setattr(admission, "_limits", replace(admission._limits, queue_s=PATIENCE_S))
        asked = asyncio.create_task(suite.generate())
        await waiting(suite, 1)
        suite.first.sequences.clear()
        suite.first._notify()
        assert list((await asked).token_ids) == model().generate(PROMPT, 8)


async def test_room_is_counted_where_the_work_is_done() -> None:
    """Of engines with roles, those that prefill have no sequences to give, and those that decode no prompts."""
    peers: dict[str, FakeEngine] = {}
    labels = {"a": {"role": "prefill"}, "b": {"role": "decode"}, "c": {"role": "decode"}, "d": {}}
    engines = [FakeEngine(model(), name, peers=peers, labels=labels[name], max_batch_size=8) for name in "abcd"]
    async with running(engines=engines) as suite:
        registry = suite.router.registry
        key = registry.models()[0].key
        assert registry.capacity(key) == Capacity(num_engines=2, sequences=24)
        suite.router.membership.remove(engines[0].address)  # without one role there is none
        assert registry.capacity(key) == Capacity(num_engines=3, sequences=24)
        suite.router.membership.drain(engines[1].address, True)
        assert registry.capacity(key) == Capacity(num_engines=2, sequences=16)
        assert registry.capacity(key._replace(digest=b"other")) == Capacity()


@pytest.mark.parametrize(("key", "value"), [("priority", "urgent"), ("tenant", "t" * 200)])
async def test_priority_and_tenant_are_checked(key: str, value: str) -> None:
    async with running(1) as suite:
        with failing("INVALID_ARGUMENT", "INVALID_REQUEST"):
            await said(suite, {key: value})
        for good in ({"priority": "high", "tenant": "somebody"}, {"priority": "low"}):
            assert len((await said(suite, good)).token_ids) == 8


async def said(suite: Running, metadata: dict[str, str]) -> router_pb2.GenerateResponse:
    """An answer to a request with this metadata."""
    call = suite.stub.Complete(
        router_pb2.CompleteRequest(request=request()),
        metadata=[(f"x-microserve-{key}", value) for key, value in metadata.items()],
        timeout=60,
    )
    try:
        return (await call).response
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from None


async def test_over_http_overload_is_429_with_advice_and_headers_say_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    async with (
        running(engines=small_engines("a"), http_listen="127.0.0.1:0") as suite,
        openai.AsyncOpenAI(base_url=f"http://{suite.http}/v1", api_key="any", max_retries=0) as client,
    ):
        ask = client.completions.create
        with pytest.raises(openai.BadRequestError, match="priority"):
            await ask(model="fake", prompt="x", extra_headers={"x-microserve-priority": "urgent"})
        headers = {"x-microserve-priority": "low", "x-microserve-tenant": "somebody"}
        assert (await ask(model="fake", prompt="x", extra_headers=headers)).choices
        suite.first.gate.clear()
        call = suite.stream()
        await suite.first.until(lambda: suite.first.sequences)
        admission = suite.router.admission
        monkeypatch.setattr(admission, "_limits", replace(admission._limits, queue_s=0.1))
        before = REFUSALS.labels("low", "queue_time")._value.get()
        with pytest.raises(openai.RateLimitError) as caught:
            await ask(model="fake", prompt="x", extra_headers=headers)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert REFUSALS.labels("low", "queue_time")._value.get() == before + 1
        call.cancel()


async def test_both_doors_say_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    async with (
        running(1, http_listen="127.0.0.1:0") as suite,
        openai.AsyncOpenAI(base_url=f"http://{suite.http}/v1", api_key="any", max_retries=0) as client,
    ):
        turn = suite.router.admission.turn

        def spied(ticket: Ticket) -> AbstractAsyncContextManager[Turn]:
            asked.append((ticket.priority.value, ticket.tenant))
            return turn(ticket)

        monkeypatch.setattr(suite.router.admission, "turn", spied)
        await said(suite, {"priority": "high", "tenant": "one"})
        headers = {"x-microserve-priority": "low", "x-microserve-tenant": "two"}
        await client.completions.create(model="fake", prompt="x", extra_headers=headers)
        await suite.generate()
    assert asked == [("high", "one"), ("low", "two"), ("normal", "")]


async def test_a_request_costs_what_it_can_get_at_most_and_so_does_each_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    costs: list[int] = []
    async with running(1) as suite:
        admission = suite.router.admission
        turn = admission.turn

        def spied(ticket: Ticket) -> AbstractAsyncContextManager[Turn]:
            costs.append(ticket.cost(usual_output=0))
            return turn(ticket)

        monkeypatch.setattr(admission, "turn", spied)
        # Unbounded, one such request in the queue would count for hours of work, and all others would be refused.
        await suite.generate(max_tokens=2**31)
        await suite.generate(max_tokens=3, n=4)
    [context] = {each.info.max_context for each in suite.router.registry.members.values() if each.info is not None}
    assert costs == [context, len(PROMPT) + 3, 3, 3, 3]


async def test_an_answer_that_is_cut_off_has_cost_what_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    had: asyncio.Queue[int] = asyncio.Queue()
    end = Line.end

    def watched(line: Line, turn: Turn) -> None:
        had.put_nowait(turn.num_tokens)
        end(line, turn)

    monkeypatch.setattr(Line, "end", watched)
    async with running(1) as suite:
        await suite.generate(max_tokens=5)
        suite.first.faults["StartGenerate"] = Fault(after_tokens=3)
        call, num_tokens = suite.stream(), 0
        while num_tokens < 3:
            num_tokens += len((await call.read()).token_ids)
        call.cancel()
        async with asyncio.timeout(PATIENCE_S):
            assert [await had.get(), await had.get()] == [5, 3]
