"""Several answers to one prompt, and prompts told back."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import aclosing

import openai
import pytest
from microserve.router.v1 import admin_pb2, router_pb2
from prometheus_client import REGISTRY

from services.router.asking import Beside
from services.router.beside import beside
from services.router.choices import merge
from services.router.errors import InvalidRequest
from services.router.programs.loader import load_source
from services.router.programs.program import POLICY
from services.router.request import PolicyRequest
from services.router.values import Sampling, Verb
from tests.fakes import Fault
from tests.router.harness import PROMPT, Running, failing, model, policy_metadata, request, running, verbs
from tests.router.openai_client import serving
from tests.router.vocabularies import byte_level

TAKES_PARAMS = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Params:
    x: int = 1

async def policy(request, fleet, params=None):
    async for chunk in fleet.engines[0].start_generate(request):
        yield chunk
"""


async def complete(suite: Running, policy: str = "", **options: object) -> list[router_pb2.GenerateResponse]:
    """All choices."""
    asked = router_pb2.CompleteRequest(request=request(**options))
    reply = await suite.stub.Complete(asked, metadata=policy_metadata(policy), timeout=60)
    return [reply.response, *reply.other_choices]


async def test_choices_are_numbered_and_each_is_whole() -> None:
    async with running() as suite:
        texts: defaultdict[int, str] = defaultdict(str)
        pieces = [piece async for piece in suite.stream(n=3, temperature=1.0, seed=5)]
        for piece in pieces:
            texts[piece.choice] += piece.text
        assert len(set(texts.values())) == len(texts) == 3
        for choice in range(3):
            own = [piece for piece in pieces if piece.choice == choice]
            assert [piece.request_id != "" for piece in own] == [True] + [False] * (len(own) - 1)
            assert own[-1].usage.output_token_count == 8
            assert sum(len(piece.token_ids) for piece in own) == 8
        whole = await complete(suite, n=3, temperature=1.0, seed=5)
        assert [answer.text for answer in whole] == [texts[choice] for choice in range(3)]
        assert [answer.choice for answer in whole] == [0, 1, 2]


async def test_the_first_choice_is_what_one_alone_gives() -> None:
    async with running() as suite:
        [alone] = await complete(suite, temperature=1.0, seed=5)
        three = await complete(suite, n=3, temperature=1.0, seed=5)
        assert list(three[0].token_ids) == list(alone.token_ids) == model().generate(PROMPT, 8, seed=5)
        seeds = [start.sampling.seed for engine in suite.engines for start in engine.called("Session")]
        assert len(set(seeds)) == 3  # of four starts: 5 twice


async def test_greedy_choices_are_equal() -> None:
    async with running() as suite:
        assert len({answer.text for answer in await complete(suite, n=4)}) == 1


async def test_later_choices_run_where_the_prompt_is() -> None:
    async with running(policy="disaggregated") as suite:
        first, *others = await complete(suite, n=3)
        assert [verb for verb, *_ in verbs(first)] == ["prep_recv", "remote_send", "start_generate"]
        engine = verbs(first)[-1][1]
        for other in others:
            assert verbs(other) == [("start_generate", engine, 0, len(PROMPT))]
            assert other.usage.cached_token_count > 0
            assert other.policy == "disaggregated"


async def test_without_the_engine_that_has_the_prompt_the_policy_chooses() -> None:
    async with running() as suite:
        program = beside(Beside(suite.router.catalogue.resolve("disaggregated"), "gone"))
        [served] = suite.router.registry.models()
        deadline = asyncio.get_running_loop().time() + 10
        asked = PolicyRequest("test", served.key, PROMPT, Sampling(max_tokens=4), deadline=deadline)
        run = suite.router._host.run(program, asked)
        chunks = []
        while (chunk := await run.take()) is not None:
            chunks.append(chunk)
        await run.close()
        assert [token for chunk in chunks for token in chunk.token_ids] == model().generate(PROMPT, 4)
        assert [leg.verb for leg in run.legs.legs()] == [Verb.PREP_RECV, Verb.REMOTE_SEND, Verb.START_GENERATE]


async def test_all_choices_end_on_the_program_that_the_first_began_with() -> None:
    async with running(1) as suite:
        mine = load_source("mine", TAKES_PARAMS, POLICY)
        suite.router.catalogue.add(mine)
        suite.first.gate.clear()
        asking = asyncio.create_task(complete(suite, n=2, policy="mine:x=2"))
        await suite.first.until(lambda: suite.first.sequences)
        suite.router.catalogue.add(load_source("mine", TAKES_PARAMS.replace("Params", "Other"), POLICY))
        suite.first.gate.set()
        for answer in await asking:
            assert (list(answer.token_ids), answer.policy) == (model().generate(PROMPT, 8), "mine:x=2")


@pytest.mark.parametrize("named", ["", "mine", "x" * 128])
async def test_each_answer_of_a_call_has_a_name_of_its_own(named: str) -> None:
    async with serving() as (suite, client):
        given = {"x-request-id": named} if named else {}
        raw = await client.completions.with_raw_response.create(
            model="", prompt=[[10], [10, 11], [10, 11, 12]], n=2, max_tokens=2, extra_headers=given
        )
        request_id = raw.headers["x-request-id"]
        assert raw.parse().id == f"cmpl-{request_id}"
        assert request_id == named or not named
        names = [request_id, *(request_id[:126] + f"#{choice}" for choice in range(1, 6))]
        told = [await suite.admin.ExplainRequest(admin_pb2.ExplainRequestRequest(request_id=name)) for name in names]
        assert [leg.range.end for each in told for leg in each.legs] == [1, 1, 2, 2, 3, 3]
        assert {start.client_request_id for start in suite.first.called("Session")} == set(names)


async def test_a_choice_that_fails_ends_all() -> None:
    async with running(1) as suite:
        suite.first.gate.clear()
        asking = asyncio.create_task(suite.generate(n=2))
        await suite.first.until(lambda: suite.first.sequences)
        suite.first.faults["StartGenerate"] = Fault(InvalidRequest("told to fail"))
        suite.first.gate.set()
        with failing("INVALID_ARGUMENT", "INVALID_REQUEST"):
            await asking
        await suite.idle()


async def test_all_choices_have_room_before_the_first_begins() -> None:
    """In place of a refusal in the middle of an answer."""
    async with running(1, max_requests=4) as suite:
        suite.first.gate.clear()
        asking = asyncio.create_task(complete(suite, n=3))
        await suite.first.until(lambda: suite.first.sequences)
        with failing("RESOURCE_EXHAUSTED", "OVERLOADED"):
            await suite.generate(n=2)
        one = asyncio.create_task(suite.generate())
        await suite.first.until(lambda: len(suite.first.sequences) == 2)
        suite.first.gate.set()
        for answer in (*await asking, await one):
            assert list(answer.token_ids) == model().generate(PROMPT, 8)
        assert len(await complete(suite, n=4)) == 4  # the room of all has come back
        with failing("INVALID_ARGUMENT", "INVALID_REQUEST"):
            await suite.generate(n=5)  # no waiting makes room for these


@pytest.mark.parametrize(
    ("n", "code", "reason"),
    [
        (1, "RESOURCE_EXHAUSTED", "OVERLOADED"),
        (2, "RESOURCE_EXHAUSTED", "OVERLOADED"),
        (3, "INVALID_ARGUMENT", "INVALID_REQUEST"),
    ],
)
async def test_a_refused_call_counts_as_one_request_that_ended(n: int, code: str, reason: str) -> None:
    async with running(1, max_requests=2) as suite:
        suite.first.gate.clear()
        asking = asyncio.create_task(complete(suite, n=2))
        await suite.first.until(lambda: suite.first.sequences)
        before = refused(code)
        with failing(code, reason):
            await suite.generate(n=n)
        assert refused(code) == (before[0] + 1, before[1] + 1)
        suite.first.gate.set()
        await asking


async def test_so_does_one_of_several_prompts() -> None:
    async with serving(max_requests=2) as (suite, client):
        suite.first.gate.clear()
        asking = asyncio.create_task(client.completions.create(model="fake", prompt="x"))
        await suite.first.until(lambda: suite.first.sequences)
        before = refused("RESOURCE_EXHAUSTED")
        with pytest.raises(openai.RateLimitError):
            await client.completions.create(model="fake", prompt=["x", "y"])
        assert refused("RESOURCE_EXHAUSTED") == (before[0] + 1, before[1] + 1)
        suite.first.gate.set()
        await asking


def refused(code: str) -> tuple[float, float]:
    """How often a request that came to no model ended so, and how many of those were timed."""
    labels = {"model": "none", "policy": "none"}
    ended = REGISTRY.get_sample_value("microserve_router_requests_total", {**labels, "code": code})
    return ended or 0.0, REGISTRY.get_sample_value("microserve_router_duration_seconds_count", labels) or 0.0


@pytest.mark.parametrize("n", [129, 2**32 - 1])
async def test_too_many_choices_are_refused(n: int) -> None:
    async with running(1) as suite:
        with failing("INVALID_ARGUMENT", "INVALID_REQUEST"):
            await suite.generate(n=n)
        assert suite.first.called("Session") == []


async def test_a_cancelled_call_ends_every_choice() -> None:
    async with running(1) as suite:
        suite.first.faults["StartGenerate"] = Fault(after_tokens=3)  # each stands then, and does not end
        call = suite.stream(n=3)
        async for piece in call:
            if piece.choice == 2:
                break
        call.cancel()
        await suite.idle()
        assert len(suite.first.called("Cancel")) == 3


async def test_prompts_are_told_back() -> None:
    ids = byte_level().encode("hello").ids
    async with running(1) as suite:
        pieces = [piece async for piece in suite.stream(text="hello", echo=True, n=2)]
        assert [piece.HasField("prompt") for piece in pieces] == [True] + [False] * (len(pieces) - 1)
        assert (pieces[0].prompt.text, list(pieces[0].prompt.token_ids)) == ("hello", ids)
        [tokens] = await complete(suite, prompt=ids, echo=True)
        assert (tokens.prompt.text, list(tokens.prompt.token_ids)) == ("hello", ids)
        [chat] = await complete(suite, chat=[("user", "hello")], echo=True)
        assert chat.prompt.text == "user\nhello\nassistant\n"
        [silent] = await complete(suite, text="hello")
        assert not silent.HasField("prompt")


async def test_a_merged_stream_that_is_cancelled_by_nobody_is_a_failure_as_others_are() -> None:
    closed: list[str] = []

    async def stand() -> AsyncGenerator[int, None]:
        try:
            await asyncio.Event().wait()
            yield 0
        finally:
            closed.append("other")

    async def cancelled() -> AsyncGenerator[int, None]:
        yield 1
        raise asyncio.CancelledError("of a task that it waited for")

    async with asyncio.timeout(60), aclosing(merge([stand(), cancelled()])) as items:
        assert await anext(items) == (1, 1)
        with pytest.raises(asyncio.CancelledError, match="of a task"):
            await anext(items)
    assert closed == ["other"]


async def test_merge_holds_streams_up_and_closes_them() -> None:
    closed: list[str] = []

    async def count(name: str, end: int) -> AsyncGenerator[int, None]:
        try:
            for number in range(end):
                yield number
        finally:
            closed.append(name)

    async with aclosing(merge([count("a", 3), count("b", 2)])) as items:
        got = [item async for item in items]
    assert sorted(got) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert sorted(closed) == ["a", "b"]
    async with aclosing(merge([count("c", 10**9), count("d", 10**9)])) as items:
        await anext(items)
    assert sorted(closed) == ["a", "b", "c", "d"]
