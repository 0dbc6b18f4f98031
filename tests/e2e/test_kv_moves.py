"""KV that comes from several engines, moves without a generation, goes back, and is computed once for many.

Three engines: on one KV transfer service everything moves by shm, on three by tcp, on two some by each.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence

import pytest
import pytest_asyncio
from microserve.engine.v1 import engine_pb2 as engine
from microserve.types.v1 import kv_pb2 as kv

from tests.e2e.compare import assert_same_generation
from tests.e2e.suite import (
    OWNER,
    Engine,
    Generated,
    Suite,
    generate,
    idle,
    prep_recv,
    remote_send,
    start_suite,
    wait_for_load,
)
from tests.models import make_tiny_llama

pytestmark = pytest.mark.slow

PAGE = 8
SERVICES = {"shm": 1, "mixed": 2, "tcp": 3}


@pytest_asyncio.fixture(scope="module", loop_scope="session", params=list(SERVICES))
async def suite(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Suite]:
    model = make_tiny_llama(tmp_path_factory.mktemp("model"))
    async with start_suite(
        model, num_engines=3, num_kvtransfers=SERVICES[request.param], policy=None, page_size=PAGE
    ) as running:
        yield running


def tokens(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 500) for _ in range(length)]


async def send_part(
    suite: Suite, at: Engine, prompt: Sequence[int], address: kv.KvAddress, part: range, salt: str
) -> engine.RemoteSendResponse:
    request = engine.RemoteSendRequest(
        owner_id=OWNER, request_id=suite.new_id(), prompt_token_ids=prompt, address=address, cache_salt=salt
    )
    request.range.begin, request.range.end = part.start, part.stop
    return await at.stub.RemoteSend(request, timeout=60)


async def copy_context(
    suite: Suite, source: Engine, target: Engine, context: Sequence[int], salt: str
) -> tuple[engine.PrepRecvResponse, engine.RemoteSendResponse]:
    """Moves a context into the target's prefix cache, with no generation."""
    prepared = await prep_recv(suite, target, context, len(context), cache_salt=salt)
    sent = await remote_send(suite, source, context, prepared.address, cache_salt=salt)
    reference = engine.ReservationRef(reservation_id=prepared.address.reservation_id, secret=prepared.address.secret)
    released = await target.stub.Release(engine.ReleaseRequest(reservation=reference, publish=True))
    assert prepared.matched_token_count + released.published_token_count == len(context)
    return prepared, sent


async def assert_as_alone(suite: Suite, at: Engine, prompt: list[int], got: Generated, salt: str) -> None:
    """`got` is what one engine gives that computes everything itself."""
    alone = await generate(suite, at, prompt, max_tokens=len(got.token_ids), salt=f"{salt} alone")

    async def forced(wanted: list[int]) -> Generated:
        return await generate(suite, at, prompt, max_tokens=len(wanted), forced=wanted, salt=salt)

    await assert_same_generation(alone, got.token_ids, forced)


async def assert_idle(suite: Suite) -> None:
    for each in suite.engines:
        await wait_for_load(each, idle)


@pytest.mark.parametrize("cut", [104, 137, 1], ids=["between pages", "inside a page", "first token"])
async def test_two_senders_at_once_fill_one_reservation(suite: Suite, cut: int) -> None:
    first, second, receiver = suite.engines
    prompt, salt = tokens(210, seed=cut), f"sources {cut}"
    prepared = await prep_recv(suite, receiver, prompt, 209, cache_salt=salt)
    sent = await asyncio.gather(
        send_part(suite, first, prompt, prepared.address, range(cut), salt),
        send_part(suite, second, prompt, prepared.address, range(cut, 209), salt),
    )
    assert [each.timing.transferred_token_count for each in sent] == [cut, 209 - cut]
    got = await generate(suite, receiver, prompt, address=prepared.address, salt=salt)
    assert got.timing.transferred_token_count == 209
    assert got.timing.transferred_bytes == sum(each.timing.transferred_bytes for each in sent)
    assert got.timing.computed_token_count == 1
    await assert_as_alone(suite, first, prompt, got, salt)
    await assert_idle(suite)


async def test_three_parts_from_two_senders_behind_what_the_receiver_has(suite: Suite) -> None:
    first, second, receiver = suite.engines
    prompt, salt = tokens(300, seed=5), "three parts"
    await generate(suite, receiver, prompt[:50], max_tokens=1, salt=salt)
    prepared = await prep_recv(suite, receiver, prompt, 299, cache_salt=salt)
    begin = prepared.address.window.begin
    assert begin == 48
    waiting = asyncio.ensure_future(generate(suite, receiver, prompt, address=prepared.address, salt=salt))
    parts = [(second, range(200, 299)), (first, range(begin, 101)), (first, range(101, 200))]
    await asyncio.gather(*(send_part(suite, at, prompt, prepared.address, part, salt) for at, part in parts))
    got = await waiting
    assert (got.timing.matched_token_count, got.timing.transferred_token_count) == (48, 251)
    await assert_as_alone(suite, second, prompt, got, salt)
    await assert_idle(suite)


async def test_a_whole_context_moves_and_is_used_by_a_later_request(suite: Suite) -> None:
    source, _, target = suite.engines
    context, salt = tokens(26 * PAGE, seed=6), "whole"
    await generate(suite, source, context, max_tokens=1, salt=salt)
    prepared, sent = await copy_context(suite, source, target, context, salt)
    assert (prepared.matched_token_count, sent.timing.computed_token_count) == (0, 0)
    await assert_idle(suite)
    got = await generate(suite, target, context, salt=salt)
    assert (got.timing.matched_token_count, got.timing.computed_token_count) == (len(context) - 1, 1)
    await assert_as_alone(suite, source, context, got, salt)
    again = await prep_recv(suite, target, context, len(context), cache_salt=salt)
    assert again.matched_token_count == len(context), "what is there is not sent again"
    await target.stub.Abort(engine.AbortRequest(owner_id=OWNER, request_id=f"call-{suite._serial}"))
    await assert_idle(suite)


async def test_what_a_decode_engine_generated_goes_back_for_the_next_turn(suite: Suite) -> None:
    """P prefills, D generates; D's KV goes to P, which serves the second turn and computes only what is new."""
    prefill, _, decode = suite.engines
    prompt, salt = tokens(101, seed=7), "turns"
    prepared = await prep_recv(suite, decode, prompt, 100, cache_salt=salt)
    await remote_send(suite, prefill, prompt, prepared.address, cache_salt=salt)
    first = await generate(suite, decode, prompt, address=prepared.address, max_tokens=60, salt=salt)
    conversation = prompt + first.token_ids
    known = conversation[: 20 * PAGE]  # of the last token there is no KV yet, and it fills pages: 160 of 161 tokens
    assert len(known) == len(conversation) - 1
    back, sent = await copy_context(suite, decode, prefill, known, salt)
    assert back.matched_token_count == 100 // PAGE * PAGE, "the prompt has been there before"
    assert sent.timing.computed_token_count == 0
    second_turn = conversation + tokens(30, seed=8)
    second = await generate(suite, prefill, second_turn, salt=salt)
    assert second.timing.matched_token_count == len(known)
    assert second.timing.computed_token_count == len(second_turn) - len(known)
    await assert_as_alone(suite, decode, second_turn, second, salt)
    await assert_idle(suite)


async def test_eight_requests_at_once_compute_their_common_prefix_once(suite: Suite) -> None:
    at, salt = suite.engines[0], "eight"
    prompts = [tokens(200, seed=9) + tokens(20, seed=number) for number in range(8)]
    got = await asyncio.gather(*(generate(suite, at, prompt, salt=salt) for prompt in prompts))
    assert sum(each.timing.computed_token_count for each in got) == 200 + 8 * 20
    for prompt, each in zip(prompts, got, strict=True):
        await assert_as_alone(suite, at, prompt, each, salt)
    await assert_idle(suite)


async def test_eight_disaggregated_requests_at_once_compute_their_common_prefix_once(suite: Suite) -> None:
    sender, _, receiver = suite.engines
    salt = "eight sent"
    prompts = [tokens(200, seed=10) + tokens(20, seed=number) for number in range(8)]

    async def serve(prompt: list[int]) -> tuple[engine.RemoteSendResponse, Generated]:
        prepared = await prep_recv(suite, receiver, prompt, 219, cache_salt=salt)
        sent = await remote_send(suite, sender, prompt, prepared.address, cache_salt=salt)
        return sent, await generate(suite, receiver, prompt, address=prepared.address, salt=salt)

    served = await asyncio.gather(*(serve(prompt) for prompt in prompts))
    assert sum(sent.timing.computed_token_count for sent, _ in served) == 200 + 8 * 19
    assert sum(got.timing.computed_token_count for _, got in served) == 8
    for prompt, (_, got) in zip(prompts, served, strict=True):
        await assert_as_alone(suite, sender, prompt, got, salt)
    await assert_idle(suite)
