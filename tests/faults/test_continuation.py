"""kill -9 of an engine under twenty requests of a router: every client gets every token once, as if nothing had
happened."""

from __future__ import annotations

import ast
import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from microserve.router.v1 import admin_pb2 as admin
from microserve.router.v1 import router_pb2 as router
from microserve.types.v1 import sampling_pb2 as sampling

from tests.e2e.prompts import mixed_prompts
from tests.e2e.suite import Answer, Suite, generate, idle, router_sees, start_suite, wait_for_load
from tests.faults.gates import Gate, StepGate
from tests.models import make_tiny_llama

pytestmark = pytest.mark.faults

NUM_STREAMS, NUM_TOKENS = 20, 150
PAGE_SIZE = 16
PROMPTS = mixed_prompts(NUM_STREAMS, 500, 200)
# engine-0 prefills, engine-1 and engine-2 decode.
DEATHS = {
    "sender_in_remote_send": (0, "send.layer.1=die"),
    "receiver_after_prep_recv": (1, "prep_recv.end=die"),
    "receiver_at_start_generate": (1, "start_generate.begin=die"),
}


# Sums with brackets in brackets, longer than what is asked for.
SUMS = sampling.Guide(grammar='start: term (/[+*]/ term){90,}\nterm: /[1-9]{1,2}/ | "(" term /[+*]/ term ")"')


def params(number: int) -> dict[str, object]:
    """Every other request samples, with penalties that depend on where the output begins."""
    if number % 2:
        return {"temperature": 0.9, "seed": 1000 + number, "presence_penalty": 0.7, "min_tokens": 100}
    return {"repetition_penalty": 1.1}


def held_to_sums(number: int) -> dict[str, object]:
    """The same, held to a grammar."""
    return {**params(number), "guide": SUMS}


async def stream(
    suite: Suite,
    number: int,
    policy: str,
    begun: asyncio.Event | None = None,
    params_of: Callable[[int], dict[str, object]] = params,
) -> Answer:
    """One request through the router; `begun` is set with its first token."""
    assert suite.router is not None
    request = router.GenerateRequest(
        tokens=router.TokenIds(ids=PROMPTS[number]),
        sampling=sampling.SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=2, **params_of(number)),
        seed_given=True,
        cache_salt="routed",
    )
    answer = Answer()
    async for message in suite.router.Generate(request, metadata=(("x-microserve-policy", policy),), timeout=120):
        answer.text += message.text
        answer.token_ids.extend(message.token_ids)
        answer.logprobs.extend(message.logprobs)
        answer.legs.extend(message.legs)
        if message.token_ids and begun is not None:
            begun.set()
    return answer


async def expected(suite: Suite, params_of: Callable[[int], dict[str, object]] = params) -> list[list[int]]:
    """What engine-2, which nobody kills, generates for each request alone."""
    alone = await asyncio.gather(
        *(
            generate(suite, suite.engines[2], prompt, max_tokens=NUM_TOKENS, salt="alone", **params_of(number))
            for number, prompt in enumerate(PROMPTS)
        )
    )
    return [each.token_ids for each in alone]


@asynccontextmanager
async def start_held(tmp_path: Path, policy: str) -> AsyncIterator[tuple[Suite, StepGate]]:
    """Three engines, and a gate before the steps of engine-1."""
    model, steps = make_tiny_llama(tmp_path / "model"), StepGate(tmp_path / "step")
    async with start_suite(model, num_engines=3, policy=policy, options_of={1: steps.options}) as suite:
        yield suite, steps


async def begin(
    suite: Suite, policy: str, gate: Gate, params_of: Callable[[int], dict[str, object]] = params
) -> list[asyncio.Task[Answer]]:
    """All requests, each of which has a token. Those on engine-1, at whose gate this is, have hardly more."""
    begun = [asyncio.Event() for _ in PROMPTS]
    asked = [asyncio.create_task(stream(suite, i, policy, begun[i], params_of)) for i in range(NUM_STREAMS)]
    await gate.until(asyncio.gather(*(each.wait() for each in begun)))
    return asked


async def empty(suite: Suite) -> None:
    """Has engine-1, which stands still, emptied by migration: its streams have left it, and one has pages elsewhere."""
    assert suite.admin is not None
    address = suite.engines[1].process.address
    await suite.admin.DrainEngine(admin.DrainEngineRequest(address=address, migrate=True))
    looking = [
        asyncio.create_task(wait_for_load(suite.engines[i], lambda report: report.reservation_count)) for i in (0, 2)
    ]
    done, others = await asyncio.wait(looking, return_when=asyncio.FIRST_COMPLETED)
    for task in others:
        task.cancel()
    await asyncio.wait(looking)
    for task in done:
        task.result()


async def check(suite: Suite, answers: list[Answer], tokens: list[list[int]], dead: int) -> None:
    assert [answer.token_ids for answer in answers] == tokens
    for answer in answers:
        assert [each.chosen.token_id for each in answer.logprobs] == answer.token_ids
    for index, engine in enumerate(suite.engines):
        if index != dead:
            await wait_for_load(engine, idle)


@pytest.mark.parametrize("policy", ["data_parallel", "disaggregated"])
async def test_the_decoding_engine_dies_after_the_first_tokens(tmp_path: Path, policy: str) -> None:
    async with start_held(tmp_path, policy) as (suite, steps):
        tokens = await expected(suite)
        with steps.closed() as gate:
            asked = await begin(suite, policy, gate)
            suite.engines[1].process.kill()
        answers = await asyncio.gather(*asked)
        await check(suite, answers, tokens, dead=1)
        generations = [[leg for leg in answer.legs if leg.verb == sampling.VERB_START_GENERATE] for answer in answers]
        continued = [legs for legs in generations if len(legs) > 1]
        assert continued
        for first, *_, last in continued:
            assert first.engine == "engine-1"
            assert last.engine != "engine-1"
            assert last.range.end > first.range.end  # with the tokens that the client had


async def test_an_engine_is_emptied_by_migration(tmp_path: Path) -> None:
    """Twenty live streams move off an engine with their KV, which is not computed again."""
    async with start_held(tmp_path, "data_parallel") as (suite, steps):
        tokens = await expected(suite)
        emptied = suite.engines[1]
        with steps.closed() as gate:
            asked = await begin(suite, "data_parallel", gate)
            await empty(suite)
        await wait_for_load(emptied, lambda report: not report.running_sequence_count)
        answers = await asyncio.gather(*asked)
        await check(suite, answers, tokens, dead=-1)
        # Three legs: there was less than a page to move.
        moved = [answer.legs for answer in answers if len(answer.legs) > 3]
        assert moved
        for legs in moved:
            [first, reserved, sent, last] = legs
            assert first.engine == sent.engine == emptied.name
            assert last.engine == reserved.engine != emptied.name
            assert sent.timing.transferred_token_count > 0
            assert last.timing.matched_token_count == sent.range.end
            assert sent.timing.computed_token_count <= 2 * PAGE_SIZE  # what its last steps had not published


@pytest.mark.parametrize("how", ["migrated", "killed"])
async def test_streams_go_on_in_their_grammar(tmp_path: Path, how: str) -> None:
    """On another engine, from where they were in it."""
    async with start_held(tmp_path, "data_parallel") as (suite, steps):
        tokens, left = await expected(suite, held_to_sums), suite.engines[1]
        with steps.closed() as gate:
            asked = await begin(suite, "data_parallel", gate, held_to_sums)
            if how == "migrated":
                await empty(suite)
            else:
                left.process.kill()
        answers = await asyncio.gather(*asked)
        await check(suite, answers, tokens, dead=-1 if how == "migrated" else 1)
        assert any(answer.legs[0].engine == left.name != answer.legs[-1].engine for answer in answers)
        for answer in answers:
            text = answer.text + "1" * (answer.text[-1] in "+*(")
            ast.parse(text + ")" * (text.count("(") - text.count(")")), mode="eval")


@pytest.mark.parametrize("death", DEATHS)
async def test_an_engine_dies_before_the_first_token(tmp_path: Path, death: str) -> None:
    dead, point = DEATHS[death]
    options = {dead: ["--fault-points", point]}
    async with start_suite(make_tiny_llama(tmp_path), num_engines=3, options_of=options) as suite:
        tokens = await expected(suite)
        answers = await asyncio.gather(*(stream(suite, i, "disaggregated") for i in range(NUM_STREAMS)))
        suite.engines[dead].process.wait(60)
        await check(suite, answers, tokens, dead)


async def test_an_engine_that_is_told_to_stop_hands_its_streams_over(tmp_path: Path) -> None:
    """Two SIGTERMs, the second of which cuts the grace short."""
    async with start_held(tmp_path, "data_parallel") as (suite, steps):
        tokens = await expected(suite)
        with steps.closed() as gate:
            asked = await begin(suite, "data_parallel", gate)
            suite.engines[1].process.terminate()
            await router_sees(suite, 2)
            suite.engines[1].process.terminate()
            answers = await asyncio.gather(*asked)
        await check(suite, answers, tokens, dead=1)
        assert any(len(answer.legs) > 1 for answer in answers)
