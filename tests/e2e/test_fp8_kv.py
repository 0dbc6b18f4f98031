"""Engines that keep KV in eight bits: among each other every way of serving is the same, and with others none moves.

Engines 0 and 1 keep KV so, engine 2 as it computes; the first belongs to another KV transfer service than the second.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import pytest_asyncio
from microserve.engine.v1 import engine_pb2 as engine
from microserve.engine.v1.engine_pb2_grpc import EngineServiceStub
from microserve.types.v1 import kv_pb2
from microserve.types.v1 import sampling_pb2 as sampling

from tests.e2e.compare import assert_same_generation
from tests.e2e.errors import failing
from tests.e2e.preemption import assert_preempted_equals_undisturbed
from tests.e2e.prompts import mixed_prompts
from tests.e2e.suite import (
    Engine,
    Generated,
    Suite,
    ask,
    generate,
    give_up,
    idle,
    pool_of,
    prep_recv,
    remote_send,
    start_suite,
    wait_for_load,
)
from tests.faults.gates import StepGate
from tests.models import make_tiny_llama

pytestmark = pytest.mark.slow

FP8 = ("--dtype", "float32", "--kv-dtype", "fp8")
PLAIN = ("--dtype", "float32")
# Of log-probabilities, where logits spread by 10 and the best two lie 3 apart. Sums in another order differ by 1e-6;
# what this takes over the border between two numbers of eight bits differs by an eighth of itself, one of thousands.
TOLERANCE = 0.3
MAX_TOKENS = 12
LAYERS, KV_HEADS, HEAD_DIM = 4, 2, 16
TOKEN_BYTES = LAYERS * 2 * KV_HEADS * HEAD_DIM


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def suite(model: Path) -> AsyncIterator[Suite]:
    """The router knows the first two alone: of engines that differ it would call one unhealthy and give it no work."""
    async with start_suite(model, num_kvtransfers=2, engine_options=FP8, kv_memory_mib=8) as running:
        extra = ["--poison-pages", "--kv-memory-mib", "8", *PLAIN]
        other = running.fleet.start_engine("engine-2", model, running.kvtransfer, extra=extra)
        running.engines.append(Engine(other, EngineServiceStub(running.connect(other.address))))
        yield running


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return mixed_prompts(12, 500, 300)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def expected(suite: Suite, prompts: list[list[int]]) -> list[Generated]:
    """One engine, one prompt at a time, nothing cached."""
    return [
        await generate(suite, suite.engines[0], prompt, max_tokens=MAX_TOKENS, salt=f"alone {number}")
        for number, prompt in enumerate(prompts)
    ]


async def test_a_page_is_a_quarter_of_float32s(suite: Suite) -> None:
    kept, other = [await suite.engines[number].stub.GetInfo(engine.GetInfoRequest()) for number in (0, 2)]
    assert (kept.layout.dtype, other.layout.dtype) == (kv_pb2.DTYPE_FLOAT8_E4M3, kv_pb2.DTYPE_FLOAT32)
    assert kept.page_count == 4 * other.page_count
    assert kept.model_digest != other.model_digest


@pytest.mark.parametrize("policy", ["data_parallel", "disaggregated", "balanced:0.5"])
async def test_every_policy_gives_the_tokens_of_one_engine(
    suite: Suite, prompts: list[list[int]], expected: list[Generated], policy: str
) -> None:
    answers = await asyncio.gather(
        *(ask(suite, prompt, policy, max_tokens=MAX_TOKENS, salt=policy) for prompt in prompts)
    )
    for prompt, want, answer in zip(prompts, expected, answers, strict=True):

        async def forced(tokens: list[int], prompt: list[int] = prompt) -> Generated:
            return await moved(suite, prompt, "forced", forced=tokens)

        await assert_same_generation(want, answer.token_ids, forced, TOLERANCE)
        for leg in answer.legs:
            if leg.verb == sampling.VERB_REMOTE_SEND:
                assert leg.timing.transferred_bytes == leg.timing.transferred_token_count * TOKEN_BYTES
    if policy == "disaggregated":
        assert sum(leg.verb == sampling.VERB_REMOTE_SEND for answer in answers for leg in answer.legs) >= 10


async def moved(suite: Suite, prompt: list[int], salt: str, **options: object) -> Generated:
    """All but the last token computed by one of the two, and sent to the other."""
    sender, receiver = suite.engines[:2]
    prepared = await prep_recv(suite, receiver, prompt, len(prompt) - 1, cache_salt=salt)
    if prepared.address.window.begin < prepared.address.window.end:
        await remote_send(suite, sender, prompt, prepared.address, cache_salt=salt)
    return await generate(suite, receiver, prompt, address=prepared.address, salt=salt, **options)


async def test_moved_pages_equal_the_senders_byte_for_byte(model: Path, prompts: list[list[int]]) -> None:
    async with start_suite(model, policy=None, engine_options=FP8, kv_memory_mib=8) as pair:
        sender, receiver = pair.engines
        prompt = prompts[-1]
        end = len(prompt) // 16 * 16
        prepared = await prep_recv(pair, receiver, prompt, end)
        await remote_send(pair, sender, prompt, prepared.address)
        theirs, ours = await pool_of(pair, sender), await pool_of(pair, receiver)
        by_content = {theirs[:, page].tobytes() for page in range(theirs.shape[1])}
        pages = prepared.address.shards[0].page_ids
        assert len(pages) == end // 16
        for page in pages:
            assert not (ours[:, page] & 0x7F == 0x7F).any(), "no NaN"
            assert len(np.unique(ours[:, page])) > 50
            assert ours[:, page].tobytes() in by_content


async def test_a_prefix_hit_equals_a_miss(suite: Suite, prompts: list[list[int]], expected: list[Generated]) -> None:
    one = suite.engines[0]
    for prompt, want in list(zip(prompts, expected, strict=True))[-3:]:
        for turn in range(2):
            again = await generate(suite, one, prompt, max_tokens=MAX_TOKENS, salt="warm")
            assert turn == 0 or again.timing.matched_token_count >= (len(prompt) - 1) // 16 * 16 > 0

            async def forced(tokens: list[int], prompt: list[int] = prompt) -> Generated:
                return await generate(suite, one, prompt, forced=tokens, salt="warm")

            await assert_same_generation(want, again.token_ids, forced, TOLERANCE)


@pytest.mark.parametrize(("sender", "receiver"), [(0, 2), (2, 0)])
async def test_nothing_moves_to_or_from_an_engine_that_keeps_kv_otherwise(
    suite: Suite, prompts: list[list[int]], sender: int, receiver: int
) -> None:
    prompt, salt = prompts[-1], f"refused {sender}"
    at, to = suite.engines[sender], suite.engines[receiver]
    moved_before = await suite.transferred_bytes()
    prepared = await prep_recv(suite, to, prompt, len(prompt) - 1, cache_salt=salt)
    with failing(grpc.StatusCode.FAILED_PRECONDITION, "MODEL_MISMATCH"):
        await remote_send(suite, at, prompt, prepared.address, cache_salt=salt)
    forged = kv_pb2.KvAddress()
    forged.CopyFrom(prepared.address)
    forged.model_digest = (await at.stub.GetInfo(engine.GetInfoRequest())).model_digest
    with failing(grpc.StatusCode.FAILED_PRECONDITION, "LAYOUT_MISMATCH"):
        await remote_send(suite, at, prompt, forged, cache_salt=salt)
    forged.layout.dtype = kv_pb2.DTYPE_FLOAT32 if sender == 2 else kv_pb2.DTYPE_FLOAT8_E4M3
    with failing(grpc.StatusCode.FAILED_PRECONDITION, "LAYOUT_MISMATCH"):
        await remote_send(suite, at, prompt, forged, cache_salt=salt)
    assert await suite.transferred_bytes() == moved_before
    await give_up(to, prepared)
    for each in suite.engines:
        await wait_for_load(each, idle)


async def test_preempted_equals_undisturbed(
    suite: Suite, model: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    chosen, length = [prompt for prompt in prompts if 14 < len(prompt) < 60][:4], 100
    assert len(chosen) > 1
    undisturbed = [
        await generate(suite, suite.engines[1], prompt, max_tokens=length, salt=f"undisturbed {number}")
        for number, prompt in enumerate(chosen)
    ]
    await assert_preempted_equals_undisturbed(
        model, StepGate(tmp_path / "step"), chosen, undisturbed, length, options=FP8, tolerance=TOLERANCE
    )


async def test_ranks_keep_their_heads_in_one_pool(tmp_path: Path, prompts: list[list[int]]) -> None:
    """KV goes from a whole engine to two ranks and back."""
    model = make_tiny_llama(tmp_path, heads=8, kv_heads=4)
    async with start_suite(
        model, policy=None, engine_options=FP8, options_of={1: ["--tp", "2"]}, kv_memory_mib=8
    ) as pair:
        prompt = prompts[-1]
        alone = await generate(pair, pair.engines[0], prompt, max_tokens=MAX_TOKENS)
        for salt in ("there", "back"):
            got = await moved(pair, prompt, salt, max_tokens=MAX_TOKENS)
            assert got.timing.computed_token_count == 1

            async def forced(tokens: list[int], salt: str = salt) -> Generated:
                return await moved(pair, prompt, f"{salt} forced", forced=tokens)

            await assert_same_generation(alone, got.token_ids, forced, TOLERANCE)
            pair.engines.reverse()
