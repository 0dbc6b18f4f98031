"""Every way of serving gives the tokens of one engine, computes nothing twice and moves exactly what it says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
from microserve.engine.v1 import engine_pb2 as engine
from microserve.types.v1 import sampling_pb2 as sampling

from services.engine.model.fetch import fetch_model
from tests.e2e.compare import assert_same_generation
from tests.e2e.preemption import assert_preempted_equals_undisturbed
from tests.e2e.prompts import mixed_prompts
from tests.e2e.shared import SharedSuite
from tests.e2e.suite import (
    Generated,
    Suite,
    ask,
    generate,
    idle,
    pool_of,
    prep_recv,
    remote_send,
    wait_for_load,
)
from tests.faults.gates import StepGate
from tests.models import make_tiny_llama

pytestmark = pytest.mark.slow

NUM_PROMPTS = 20
MAX_TOKENS = 12
# Tokens of the longest prompt, by model. The real model is SmolLM2-135M, as `make run` serves it.
LONGEST = {"tiny": 300, "smollm2-135m": 100}
# Tokens of an answer that takes long enough to meet others.
LONG_ANSWER = {"tiny": 200, "smollm2-135m": 24}
POLICIES = ["data_parallel", "disaggregated", "context_aware", "balanced:0.1", "balanced:0.5", "balanced:0.9"]


@pytest.fixture(scope="module", params=list(LONGEST))
def model_name(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def model(model_name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if model_name == "tiny":
        return make_tiny_llama(tmp_path_factory.mktemp("model"))
    return fetch_model(model_name, show_progress=False)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def suite(model_name: str, tiny_shared: SharedSuite, real_shared: SharedSuite) -> AsyncIterator[Suite]:
    async with (tiny_shared if model_name == "tiny" else real_shared).lent() as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def prompts(suite: Suite, model_name: str) -> list[list[int]]:
    info = await suite.engines[0].stub.GetInfo(engine.GetInfoRequest())
    return mixed_prompts(NUM_PROMPTS, info.vocab_size, LONGEST[model_name])


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def expected(suite: Suite, prompts: list[list[int]]) -> list[Generated]:
    return await alone(suite, prompts, MAX_TOKENS, "alone")


async def alone(suite: Suite, prompts: list[list[int]], max_tokens: int, salt: str) -> list[Generated]:
    """One engine, one prompt at a time, nothing cached; of two engines each has every other prompt."""

    async def one_by_one(first: int) -> list[Generated]:
        return [
            await generate(suite, suite.engines[first], prompts[i], max_tokens=max_tokens, salt=f"{salt} {i}")
            for i in range(first, len(prompts), 2)
        ]

    turns = await asyncio.gather(one_by_one(0), one_by_one(1))
    return [turns[i % 2][i // 2] for i in range(len(prompts))]


@pytest.mark.parametrize("policy", POLICIES)
async def test_every_policy_gives_the_tokens_of_one_engine(
    suite: Suite, prompts: list[list[int]], expected: list[Generated], policy: str
) -> None:
    token_bytes = await bytes_of_a_token(suite)
    moved_before = await suite.transferred_bytes()
    answers = await asyncio.gather(
        *(ask(suite, prompt, policy, max_tokens=MAX_TOKENS, salt=policy) for prompt in prompts)
    )
    reported = 0
    for prompt, want, answer in zip(prompts, expected, answers, strict=True):

        async def forced(tokens: list[int], prompt: list[int] = prompt) -> Generated:
            return await by_hand(suite, prompt, end_of(policy, prompt), forced=tokens)

        await assert_same_generation(want, answer.token_ids, forced)
        run = answer.leg(sampling.VERB_START_GENERATE)
        sends = [leg for leg in answer.legs if leg.verb == sampling.VERB_REMOTE_SEND]
        for send in sends:
            prepared = answer.leg(sampling.VERB_PREP_RECV)
            assert send.range.begin == prepared.timing.matched_token_count
            assert send.timing.transferred_token_count == send.range.end - send.range.begin
            assert send.timing.transferred_bytes == send.timing.transferred_token_count * token_bytes
            reported += send.timing.transferred_bytes
            # The receiver computed nothing of what it was sent.
            assert run.timing.computed_token_count == len(prompt) - send.range.end
            assert send.engine != run.engine
        if policy != "data_parallel" and policy != "context_aware" and end_of(policy, prompt) > 0:
            assert sends, "nothing was sent"
    assert reported == await suite.transferred_bytes() - moved_before
    for each in suite.engines:
        await wait_for_load(each, idle)


async def test_moved_pages_equal_the_senders_byte_for_byte(suite: Suite, prompts: list[list[int]]) -> None:
    sender, receiver = suite.engines
    prompt = prompts[-1]
    size = (await receiver.stub.GetInfo(engine.GetInfoRequest())).layout.page_size
    end = len(prompt) // size * size
    prepared = await prep_recv(suite, receiver, prompt, end, cache_salt="bytes")
    sent = await remote_send(suite, sender, prompt, prepared.address, cache_salt="bytes")
    assert sent.timing.computed_token_count >= end
    theirs, ours = await pool_of(suite, sender), await pool_of(suite, receiver)
    by_content = {theirs[:, page].tobytes() for page in range(theirs.shape[1])}
    pages = prepared.address.shards[0].page_ids
    assert len(pages) == end // size
    for page in pages:
        assert not np.isnan(ours[:, page].view(np.float32)).any()
        assert ours[:, page].tobytes() in by_content
    released = await receiver.stub.Release(
        engine.ReleaseRequest(
            reservation=engine.ReservationRef(
                reservation_id=prepared.address.reservation_id, secret=prepared.address.secret
            ),
            publish=True,
        )
    )
    assert released.published_token_count == end
    hit = await prep_recv(suite, receiver, prompt, len(prompt), cache_salt="bytes")
    assert hit.matched_token_count == end
    await receiver.stub.Abort(engine.AbortRequest(owner_id="test", request_id=f"call-{suite._serial}"))
    await wait_for_load(receiver, idle)


async def test_a_prefix_hit_equals_a_miss(suite: Suite, prompts: list[list[int]], expected: list[Generated]) -> None:
    one = suite.engines[0]
    for prompt, want in list(zip(prompts, expected, strict=True))[-4:]:
        for turn in range(2):
            again = await generate(suite, one, prompt, max_tokens=MAX_TOKENS, salt="warm")
            if turn == 1:
                assert again.timing.matched_token_count >= max(1, (len(prompt) - 1) // 16 * 16)

            async def forced(tokens: list[int], prompt: list[int] = prompt) -> Generated:
                return await generate(suite, one, prompt, forced=tokens, salt="warm")

            await assert_same_generation(want, again.token_ids, forced)


async def test_batched_equals_one_by_one(suite: Suite, prompts: list[list[int]], expected: list[Generated]) -> None:
    one = suite.engines[0]
    together = await asyncio.gather(
        *(generate(suite, one, prompt, max_tokens=MAX_TOKENS, salt=f"b {i}") for i, prompt in enumerate(prompts))
    )
    for prompt, want, got in zip(prompts, expected, together, strict=True):

        async def forced(tokens: list[int], prompt: list[int] = prompt) -> Generated:
            return await generate(suite, one, prompt, forced=tokens)

        await assert_same_generation(want, got.token_ids, forced)


async def test_preempted_equals_undisturbed(
    suite: Suite, model: Path, model_name: str, prompts: list[list[int]], tmp_path: Path
) -> None:
    chosen, length = [prompt for prompt in prompts if 14 < len(prompt) < 40][:5], LONG_ANSWER[model_name]
    undisturbed = await alone(suite, chosen, length, "undisturbed")
    await assert_preempted_equals_undisturbed(model, StepGate(tmp_path / "step"), chosen, undisturbed, length)


async def bytes_of_a_token(suite: Suite) -> int:
    layout = (await suite.engines[0].stub.GetInfo(engine.GetInfoRequest())).layout
    return layout.layer_count * 2 * layout.kv_head_count * layout.head_dim * 4


def end_of(policy: str, prompt: list[int]) -> int:
    """Where the receiver takes over, as docs/policies.md says."""
    if policy.startswith("balanced"):
        share = float(policy.partition(":")[2])
        return int(len(prompt) * (1 - share)) // 16 * 16
    return 0 if policy == "data_parallel" else len(prompt) - 1


async def by_hand(suite: Suite, prompt: list[int], end: int, *, forced: list[int]) -> Generated:
    """The same way of serving, verb by verb, so that tokens can be forced."""
    sender, receiver = suite.engines
    if end == 0:
        return await generate(suite, receiver, prompt, forced=forced, salt="forced")
    prepared = await prep_recv(suite, receiver, prompt, end, cache_salt="forced")
    await remote_send(suite, sender, prompt, prepared.address, cache_salt="forced")
    return await generate(suite, receiver, prompt, address=prepared.address, forced=forced, salt="forced")
