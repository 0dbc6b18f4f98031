"""Reservations from PrepRecv to their end, on real engines."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import grpc
import pytest
from microserve.engine.v1 import engine_pb2 as pb

from tests.contract.verbs import (
    PAGE_SIZE,
    info_of,
    prompt_of,
    ranges,
    ref_of,
    release,
    reservations,
    send_range,
)
from tests.e2e.errors import failing
from tests.e2e.suite import (
    OWNER,
    Engine,
    Suite,
    generate,
    idle,
    prep_recv,
    remote_send,
    wait_for_load,
)

pytestmark = pytest.mark.slow


async def test_list_reservations(suite: Suite) -> None:
    at = suite.engines[1]
    prompt = prompt_of(100, 3)
    mine = await prep_recv(suite, at, prompt, 100, lease_s=30, cache_salt="list")
    request = pb.PrepRecvRequest(owner_id="other", request_id="theirs", prompt_token_ids=prompt, end=50)
    theirs = await at.stub.PrepRecv(request)
    listed = await reservations(at)
    assert [info.reservation_id for info in listed] == [mine.address.reservation_id, theirs.address.reservation_id]
    (other,) = await reservations(at, "other")
    assert (other.owner_id, other.request_id) == ("other", "theirs")
    assert await reservations(at, "nobody") == []
    info = listed[0]
    assert (info.owner_id, info.state) == (OWNER, pb.RESERVATION_STATE_RESERVED)
    assert (info.window.begin, info.window.end, ranges(info.committed)) == (0, 100, [])
    assert list(info.page_ids) == list(mine.address.shards[0].page_ids)
    assert len(info.page_ids) == 7
    assert 0 < info.lease_remaining.ToMilliseconds() <= mine.lease.ToMilliseconds() <= 30_000
    for answer in (mine, theirs):
        assert all(answer.address.secret not in info.SerializeToString() for info in listed), "no secrets"
        assert len(answer.address.secret) == 16
        await release(at, answer.address)
    assert await reservations(at) == []
    await wait_for_load(at, idle)


async def test_renew_extends(suite: Suite) -> None:
    at = suite.engines[1]
    request = pb.PrepRecvRequest(owner_id=OWNER, request_id="renewed", prompt_token_ids=prompt_of(40, 4), end=40)
    request.lease.FromSeconds(20)
    prepared = await at.stub.PrepRecv(request)
    renewal = pb.RenewRequest(reservation=ref_of(prepared.address))
    renewal.lease.FromSeconds(60)
    assert (await at.stub.Renew(renewal)).lease.ToMilliseconds() == 60_000
    assert 50_000 < (await info_of(at, prepared.address)).lease_remaining.ToMilliseconds() <= 60_000
    renewal.lease.FromSeconds(1000)
    assert (await at.stub.Renew(renewal)).lease.ToSeconds() == 600, "the engine's longest"
    renewal.ClearField("lease")
    assert (await at.stub.Renew(renewal)).lease.ToSeconds() == 30, "the engine's default"
    await release(at, prepared.address)
    with failing(grpc.StatusCode.ABORTED, "RESERVATION_GONE"):
        await at.stub.Renew(renewal)


async def test_a_wish_beyond_the_longest_lease_gets_the_longest(suite: Suite) -> None:
    at = suite.engines[1]
    for seconds in (601, 1_000_000):
        request = pb.PrepRecvRequest(owner_id=OWNER, request_id=suite.new_id(), prompt_token_ids=[5, 6], end=2)
        request.lease.FromSeconds(seconds)
        prepared = await at.stub.PrepRecv(request)
        assert 590 < prepared.lease.ToSeconds() <= 600
        await release(at, prepared.address)


async def test_release_frees_what_is_not_filled_and_keeps_the_rest_cached(suite: Suite) -> None:
    sender, at = suite.engines[:2]
    prompt, before = prompt_of(100, 5), (await wait_for_load(at, idle)).pages
    for filled in (False, True):
        prepared = await prep_recv(suite, at, prompt, 100)
        await wait_for_load(at, lambda report: report.pages.held == before.held + 7)
        if filled:
            await remote_send(suite, sender, prompt, prepared.address)
        assert await release(at, prepared.address) == 0, "the count was not asked for"
        after = (await wait_for_load(at, idle)).pages
        num_cached = 100 // 16 if filled else 0
        assert (after.free, after.cached) == (before.free - num_cached, before.cached + num_cached)
        assert await release(at, prepared.address) == 0, "idempotent"
    assert (await generate(suite, at, prompt)).timing.matched_token_count == 96


async def test_release_publishes_only_what_is_filled(suite: Suite) -> None:
    sender, at = suite.engines[:2]
    prompt = prompt_of(100, 6)
    prepared = await prep_recv(suite, at, prompt, 100)
    await send_range(suite, sender, prompt, prepared.address, 0, 64)
    assert await release(at, prepared.address, publish=True) == 0
    await wait_for_load(at, idle)
    assert (await prep_recv_and_release(suite, at, prompt)) == 0


async def prep_recv_and_release(suite: Suite, at: Engine, prompt: Sequence[int]) -> int:
    prepared = await prep_recv(suite, at, prompt, len(prompt))
    await release(at, prepared.address)
    return prepared.matched_token_count


async def test_migration_of_a_whole_prompt(suite: Suite) -> None:
    sender, at = suite.engines[:2]
    for seed in range(20):  # every time: the receiver may not have heard of the commit, and asks when it is released
        prompt = prompt_of(90 + seed, 1000 + seed)
        whole = len(prompt) // PAGE_SIZE * PAGE_SIZE
        salt = f"tenant {seed}"
        here = await generate(suite, sender, prompt, salt="apart")
        prepared = await prep_recv(suite, at, prompt, len(prompt), cache_salt=salt)
        assert prepared.matched_token_count == 0
        await remote_send(suite, sender, prompt, prepared.address, cache_salt=salt)
        assert await release(at, prepared.address, publish=True) == whole
        assert await release(at, prepared.address, publish=True) == whole, "idempotent, with the same answer"
        there = await generate(suite, at, prompt, salt=salt)
        # At least the last token is computed again.
        expected = min(whole, len(prompt) - 1)
        assert there.timing.matched_token_count == expected
        assert there.timing.computed_token_count == len(prompt) - expected
        assert there.token_ids == here.token_ids
    await wait_for_load(at, idle)


async def test_an_empty_reservation_is_born_filled(suite: Suite) -> None:
    at, prompt = suite.engines[1], prompt_of(40, 7)
    prepared = await prep_recv(suite, at, prompt, 0)
    assert prepared.matched_token_count == 0
    assert (prepared.address.window.begin, prepared.address.window.end) == (0, 0)
    info = await info_of(at, prepared.address)
    assert (info.state, list(info.page_ids)) == (pb.RESERVATION_STATE_FILLED, [])
    await send_range(suite, suite.engines[0], prompt, prepared.address, 0, 0)
    result = await generate(suite, at, prompt, address=prepared.address)
    assert result.token_ids == (await generate(suite, suite.engines[0], prompt)).token_ids
    assert result.timing.computed_token_count == 40
    # So is one whose tokens are all cached.
    cached = await prep_recv(suite, at, prompt, 32)
    assert cached.matched_token_count == 32
    assert (await info_of(at, cached.address)).state == pb.RESERVATION_STATE_FILLED
    assert await release(at, cached.address, publish=True) == 0
    await wait_for_load(at, idle)


async def test_generate_before_send_waits_for_the_kv(suite: Suite) -> None:
    sender, at = suite.engines[:2]
    prompt = prompt_of(100, 8)
    expected = await generate(suite, sender, prompt, salt="apart")
    prepared = await prep_recv(suite, at, prompt, 100)
    waiting = asyncio.ensure_future(generate(suite, at, prompt, address=prepared.address))
    await wait_for_load(at, lambda report: report.waiting_for_kv_count == 1)
    await remote_send(suite, sender, prompt, prepared.address)
    result = await waiting
    assert result.token_ids == expected.token_ids
    assert (result.timing.transferred_token_count, result.timing.computed_token_count) == (100, 1)
    assert result.timing.transfer.ToMicroseconds() > 0
    await wait_for_load(at, idle)


async def test_generate_that_waits_hears_of_the_end_of_its_reservation(suite: Suite) -> None:
    at, prompt = suite.engines[1], prompt_of(100, 9)
    prepared = await prep_recv(suite, at, prompt, 100)
    waiting = asyncio.ensure_future(generate(suite, at, prompt, address=prepared.address))
    await wait_for_load(at, lambda report: report.waiting_for_kv_count == 1)
    await release(at, prepared.address)
    with failing(grpc.StatusCode.ABORTED, "RESERVATION_GONE"):
        await waiting
    await wait_for_load(at, idle)


async def test_two_senders_fill_one_reservation(suite: Suite) -> None:
    one, at, two = suite.engines
    prompt = prompt_of(100, 10)
    prepared = await prep_recv(suite, at, prompt, 100)
    sent = await send_range(suite, two, prompt, prepared.address, 41, 100)
    assert sent.timing.transferred_token_count == 59
    async with asyncio.timeout(60):
        while ranges((info := await info_of(at, prepared.address)).committed) != [(41, 100)]:
            pass
    assert info.state in (pb.RESERVATION_STATE_RESERVED, pb.RESERVATION_STATE_FILLING)
    await send_range(suite, one, prompt, prepared.address, 0, 41)
    async with asyncio.timeout(60):
        while (info := await info_of(at, prepared.address)).state != pb.RESERVATION_STATE_FILLED:
            pass
    assert ranges(info.committed) == [(0, 100)]
    result = await generate(suite, at, prompt, address=prepared.address)
    assert result.timing.computed_token_count == 1
    assert result.token_ids == (await generate(suite, one, prompt, salt="apart")).token_ids
    # Both at once, and from one engine.
    again = await prep_recv(suite, two, prompt_of(120, 11), 120)
    halves = [(0, 60), (60, 120)]
    await asyncio.gather(*(send_range(suite, one, prompt_of(120, 11), again.address, *half) for half in halves))
    result = await generate(suite, two, prompt_of(120, 11), address=again.address, max_tokens=8)
    apart = await generate(suite, one, prompt_of(120, 11), max_tokens=8, salt="apart")
    assert (result.token_ids, result.timing.computed_token_count) == (apart.token_ids, 1)
    for engine in suite.engines:
        await wait_for_load(engine, idle)


async def test_turns_go_to_and_fro(suite: Suite) -> None:
    prefill, decode = suite.engines[:2]
    conversation = prompt_of(100, 12)
    for turn in range(3):
        kept = await prep_recv(suite, decode, conversation, len(conversation))
        await remote_send(suite, prefill, conversation, kept.address)
        answer = await generate(suite, decode, conversation, address=kept.address, max_tokens=40)
        fresh = await generate(suite, prefill, conversation, max_tokens=40, salt=f"fresh {turn}")
        assert answer.token_ids == fresh.token_ids
        # Back: what the decode engine made is not computed again.
        conversation += answer.token_ids[:-1]
        back = await prep_recv(suite, prefill, conversation, len(conversation))
        first = back.matched_token_count
        sent = await remote_send(suite, decode, conversation, back.address)
        whole = len(conversation) // PAGE_SIZE * PAGE_SIZE
        assert sent.timing.transferred_token_count == len(conversation) - first
        assert sent.timing.matched_token_count >= whole - PAGE_SIZE
        assert sent.timing.computed_token_count <= PAGE_SIZE
        assert await release(prefill, back.address, publish=True) == whole - first
        conversation += [answer.token_ids[-1], *prompt_of(21, 200 + turn)]
        assert await prep_recv_and_release(suite, prefill, conversation) >= whole
    for engine in (prefill, decode):
        await wait_for_load(engine, idle)


# --- too few pages ----------------------------------------------------------------------------------------------
