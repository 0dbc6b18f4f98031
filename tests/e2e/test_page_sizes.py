"""Engines whose pages differ in size serve each other, over the verbs and over the router."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from microserve.types.v1 import sampling_pb2 as sampling

from tests.e2e.compare import assert_same_generation
from tests.e2e.prompts import mixed_prompts
from tests.e2e.suite import (
    Generated,
    Suite,
    ask,
    generate,
    idle,
    prep_recv,
    remote_send,
    start_suite,
    wait_for_load,
)
from tests.models import make_tiny_llama

pytestmark = pytest.mark.slow

MAX_TOKENS = 12
# Neither divides the other.
PAGE_SIZES = (16, 24)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def suite(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Suite]:
    model = make_tiny_llama(tmp_path_factory.mktemp("model"))
    options = {i: ["--page-size", str(size)] for i, size in enumerate(PAGE_SIZES)}
    async with start_suite(model, options_of=options) as running:
        yield running


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return mixed_prompts(12, 500, 200)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def expected(suite: Suite, prompts: list[list[int]]) -> list[Generated]:
    return [
        await generate(suite, suite.engines[0], prompt, max_tokens=MAX_TOKENS, salt=f"alone {i}")
        for i, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize("direction", [(0, 1), (1, 0)], ids=["small_to_large", "large_to_small"])
async def test_what_was_moved_is_what_would_be_computed(
    suite: Suite, prompts: list[list[int]], expected: list[Generated], direction: tuple[int, int]
) -> None:
    sender, receiver = (suite.engines[i] for i in direction)
    for prompt, want in zip(prompts, expected, strict=True):

        async def moved(forced: list[int], prompt: list[int] = prompt) -> Generated:
            salt = suite.new_id()
            prepared = await prep_recv(suite, receiver, prompt, len(prompt) - 1, cache_salt=salt)
            await remote_send(suite, sender, prompt, prepared.address, cache_salt=salt)
            return await generate(
                suite, receiver, prompt, address=prepared.address, max_tokens=MAX_TOKENS, forced=forced, salt=salt
            )

        result = await moved([])
        await assert_same_generation(want, result.token_ids, moved)
        assert result.timing.computed_token_count == 1, "the receiver computed something that it was sent"
    for each in suite.engines:
        await wait_for_load(each, idle)


async def test_the_router_disaggregates_between_them(
    suite: Suite, prompts: list[list[int]], expected: list[Generated]
) -> None:
    answers = await asyncio.gather(
        *(ask(suite, prompt, "balanced:0.5", max_tokens=MAX_TOKENS, salt="router") for prompt in prompts)
    )
    for prompt, want, answer in zip(prompts, expected, answers, strict=True):

        async def again(forced: list[int], prompt: list[int] = prompt) -> Generated:
            return await generate(suite, suite.engines[1], prompt, forced=forced, salt=suite.new_id())

        await assert_same_generation(want, answer.token_ids, again)
    assert any(leg.verb == sampling.VERB_REMOTE_SEND for answer in answers for leg in answer.legs)
    for each in suite.engines:
        await wait_for_load(each, idle)
