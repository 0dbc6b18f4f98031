"""A planner over real engines: a hot context is where requests will come for it, before they come, and nothing leaks.

Three engines: on one KV transfer service everything moves by shm, on three by tcp.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio
from microserve.router.v1 import admin_pb2 as admin
from microserve.types.v1 import sampling_pb2 as sampling

from tests.e2e.compare import assert_same_generation
from tests.e2e.suite import Answer, Engine, Generated, Suite, ask, generate, idle, start_suite, wait_for_load
from tests.models import make_tiny_llama

pytestmark = pytest.mark.slow

PAGE, CONTEXT, PATIENCE_S = 8, 320, 120.0
HALF_A_MOVE = Path(__file__).with_name("half_a_move.py")
FIRST_BY_NAME = Path(__file__).with_name("first_by_name.py")
OPTIONS = ["--planner-interval", "0.1", "--planner-file", str(HALF_A_MOVE)]


def tokens(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 500) for _ in range(length)]


@pytest_asyncio.fixture(scope="module", loop_scope="session", params=[1, 3], ids=["shm", "tcp"])
async def suite(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Suite]:
    model = make_tiny_llama(tmp_path_factory.mktemp("model"))
    async with start_suite(
        model,
        num_engines=3,
        num_kvtransfers=request.param,
        policy=FIRST_BY_NAME,
        page_size=PAGE,
        engine_options=["--lease-default", "8"],
        router_options=OPTIONS,
    ) as running:
        yield running


async def start(suite: Suite, name: str) -> None:
    assert suite.admin is not None
    await suite.admin.StartPlanner(admin.StartPlannerRequest(name=name))


async def stop(suite: Suite) -> None:
    assert suite.admin is not None
    await suite.admin.StopPlanner(admin.StopPlannerRequest())


async def seen(suite: Suite, condition: Callable[[admin.GetPlannerResponse], object]) -> admin.GetPlannerResponse:
    """Asks until the planner's state is so."""
    assert suite.admin is not None
    async with asyncio.timeout(PATIENCE_S):
        while not condition(reply := await suite.admin.GetPlanner(admin.GetPlannerRequest())):
            assert not reply.problem
    return reply


async def make_hot(suite: Suite, context: list[int], salt: str) -> None:
    """Asks the first engine for it as often as makes a topic."""
    for number in range(3):
        answer = await ask(suite, [*context, *tokens(9, seed=number)], "", max_tokens=2, salt=salt)
        assert generation(answer).engine == suite.engines[0].name


async def drain(suite: Suite, at: Engine, *, resume: bool = False) -> None:
    assert suite.admin is not None
    await suite.admin.DrainEngine(admin.DrainEngineRequest(address=at.process.address, resume=resume))


async def assert_idle(suite: Suite) -> None:
    for each in suite.engines:
        await wait_for_load(each, idle)


def generation(answer: Answer) -> sampling.Leg:
    return answer.leg(sampling.VERB_START_GENERATE)


async def test_later_requests_for_a_hot_context_compute_none_of_it_elsewhere(suite: Suite) -> None:
    """Nothing but the planner has ever called the second engine. The tiny model computes so fast that no move pays:
    gain=0."""
    first, second, _ = suite.engines
    context, salt = tokens(CONTEXT, seed=1), "hot"
    await start(suite, "by_topic:replicas=2,gain=0")
    await make_hot(suite, context, salt)
    [move] = (await seen(suite, lambda reply: reply.moves)).moves
    assert (move.source_engine, move.target_engine, move.code) == (first.name, second.name, "OK")
    assert (move.token_count, move.moved_token_count) == (CONTEXT, CONTEXT)
    assert move.moved_bytes > 0
    await assert_idle(suite)
    await drain(suite, first)
    try:
        prompt = [*context, *tokens(30, seed=99)]
        answer = await ask(suite, prompt, "", salt=salt)
        leg = generation(answer)
        assert leg.engine == second.name
        assert (leg.timing.matched_token_count, leg.timing.computed_token_count) == (CONTEXT, 30)
        alone = await generate(suite, first, prompt, max_tokens=len(answer.token_ids), salt="alone")

        async def forced(wanted: list[int]) -> Generated:
            return await generate(suite, second, prompt, max_tokens=len(wanted), forced=wanted, salt=salt)

        await assert_same_generation(alone, answer.token_ids, forced)
    finally:
        await drain(suite, first, resume=True)
        await stop(suite)
    await assert_idle(suite)


async def test_stopped_in_the_middle_of_a_move_a_planner_leaks_no_page(suite: Suite) -> None:
    """Half of the context is there and will never be whole: its pages come back, and nobody takes it for cached."""
    second, context, salt = suite.engines[1], tokens(CONTEXT, seed=2), "half"
    await start(suite, "half_a_move")
    await make_hot(suite, context, salt)
    await wait_for_load(second, lambda report: report.reservation_count == 1)
    await stop(suite)
    await assert_idle(suite)
    answer = await ask(suite, [*context, 7], "", salt=salt)
    assert generation(answer).timing.matched_token_count == CONTEXT, "where it was it still is"
    there = await generate(suite, second, [*context, 7], salt=salt)
    assert there.timing.computed_token_count + there.timing.matched_token_count == CONTEXT + 1

    async def forced(wanted: list[int]) -> Generated:
        return await generate(suite, second, [*context, 7], max_tokens=len(wanted), forced=wanted, salt=salt)

    alone = await generate(suite, second, [*context, 7], salt="half alone")
    await assert_same_generation(alone, answer.token_ids, forced)
    await assert_same_generation(alone, there.token_ids, forced)
    await assert_idle(suite)


async def test_a_router_killed_in_the_middle_of_a_move_leaks_no_page(suite: Suite) -> None:
    """Nobody is left to release what its planner held: the lease does. Last, for the router is gone."""
    second, context = suite.engines[1], tokens(CONTEXT, seed=3)
    await start(suite, "half_a_move")
    await make_hot(suite, context, "killed")
    await wait_for_load(second, lambda report: report.reservation_count == 1)
    assert suite.router_process is not None
    suite.router_process.kill()
    await assert_idle(suite)
