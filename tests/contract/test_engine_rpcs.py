"""Every rpc of EngineService on real engines, held against what engine.proto says of it."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence

import grpc
import pytest
import pytest_asyncio
from microserve.engine.v1 import engine_pb2 as pb
from microserve.types.v1 import kv_pb2 as kv

from services.protocol.hashes import block_hashes, hash_seed
from tests.e2e.errors import failing, outcome
from tests.e2e.suite import (
    OWNER,
    Engine,
    Suite,
    generate,
    idle,
    load,
    prep_recv,
    remote_send,
    start_suite,
    wait_for_load,
)
from tests.models import make_tiny_llama

pytestmark = pytest.mark.slow

VOCAB, MAX_CONTEXT, PAGE_SIZE = 512, 2048, 16
# A longest prompt takes 8 pages of the small engine, so reservations may have 16 of its 24.
SMALL_PAGES, SMALL_CONTEXT = 24, 128
RPCS = {
    "PrepRecv",
    "RemoteSend",
    "StartGenerate",
    "Session",
    "Complete",
    "Release",
    "Renew",
    "Abort",
    "GetInfo",
    "WatchLoad",
    "WatchKvEvents",
    "ListReservations",
    "GetTokenizer",
}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def suite(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Suite]:
    model = make_tiny_llama(tmp_path_factory.mktemp("model"), vocab=VOCAB, max_context=MAX_CONTEXT)
    large = ("--pages", "600", "--labels", "zone=a")
    small = ("--pages", str(SMALL_PAGES), "--max-context", str(SMALL_CONTEXT))
    options = {0: large, 1: large, 2: small}
    async with start_suite(model, num_engines=3, policy=None, page_size=PAGE_SIZE, options_of=options) as running:
        yield running


def prompt_of(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, VOCAB) for _ in range(length)]


def ref_of(address: kv.KvAddress) -> pb.ReservationRef:
    return pb.ReservationRef(reservation_id=address.reservation_id, secret=address.secret)


async def release(at: Engine, address: kv.KvAddress, *, publish: bool = False) -> int:
    answer = await at.stub.Release(pb.ReleaseRequest(reservation=ref_of(address), publish=publish), timeout=30)
    return answer.published_token_count


async def reservations(at: Engine, owner_id: str = "") -> list[pb.ReservationInfo]:
    answer = await at.stub.ListReservations(pb.ListReservationsRequest(owner_id=owner_id), timeout=30)
    return list(answer.reservations)


async def info_of(at: Engine, address: kv.KvAddress) -> pb.ReservationInfo:
    (found,) = [info for info in await reservations(at) if info.reservation_id == address.reservation_id]
    return found


async def send_range(
    suite: Suite, at: Engine, prompt: Sequence[int], address: kv.KvAddress, begin: int, end: int
) -> pb.RemoteSendResponse:
    request = pb.RemoteSendRequest(
        owner_id=OWNER,
        request_id=suite.new_id(),
        prompt_token_ids=prompt,
        range=kv.TokenRange(begin=begin, end=end),
        address=address,
        attempt=1,
    )
    return await at.stub.RemoteSend(request, timeout=60)


def ranges(infos: Sequence[kv.TokenRange]) -> list[tuple[int, int]]:
    return [(one.begin, one.end) for one in infos]


# --- what an engine says of itself ------------------------------------------------------------------------------


async def test_the_service_has_exactly_these_rpcs(suite: Suite) -> None:
    service = pb.DESCRIPTOR.services_by_name["EngineService"]
    assert {method.name for method in service.methods} == RPCS
    for name in sorted(RPCS):
        path = f"/{service.full_name}/{name}"
        # A stream both ways carries any rpc; the empty request must reach the engine's own rules, not "unimplemented".
        call = suite.channels[0].stream_stream(path)(iter([b""]), timeout=5)
        code = await outcome(call.read())
        assert code not in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.INTERNAL), name
        call.cancel()
    await wait_for_load(suite.engines[0], idle)


async def test_get_info(suite: Suite) -> None:
    infos = [await at.stub.GetInfo(pb.GetInfoRequest()) for at in suite.engines]
    assert [info.engine_name for info in infos] == ["engine-0", "engine-1", "engine-2"]
    assert len({info.incarnation for info in infos}) == 3
    assert len({(info.model_digest, info.tokenizer_digest, info.model) for info in infos}) == 1
    assert [info.page_count for info in infos] == [600, 600, SMALL_PAGES]
    assert [info.max_context_length for info in infos] == [MAX_CONTEXT, MAX_CONTEXT, SMALL_CONTEXT]
    assert [dict(info.labels) for info in infos] == [{"zone": "a"}, {"zone": "a"}, {}]
    for info in infos:
        assert len(info.incarnation) == 16
        assert info.model_digest
        assert info.tokenizer_digest
        assert info.model
        assert info.contract_version == "1.0"
        assert (info.vocab_size, info.device, list(info.eos_token_ids)) == (VOCAB, "cpu", [2])
        assert info.max_batch_size == 64
        assert info.kvtransfer_endpoint == suite.kvtransfer.address
        assert len(info.transports) > 0
        expected = kv.PageLayout(
            layer_count=4,
            kv_head_count=2,
            head_dim=16,
            page_size=PAGE_SIZE,
            dtype=kv.DTYPE_FLOAT32,
            order=kv.PAGE_ORDER_KV_HEAD_TOKEN_DIM,
        )
        assert info.layout == expected


async def test_get_tokenizer(suite: Suite, tmp_path_factory: pytest.TempPathFactory) -> None:
    at = suite.engines[0]
    files: dict[str, bytes] = {}
    async for piece in at.stub.GetTokenizer(pb.GetTokenizerRequest(known_digest=b"another")):
        assert len(piece.data) <= 1 << 20
        files[piece.file_name] = files.get(piece.file_name, b"") + piece.data
    assert set(files) == {"tokenizer.json", "special_tokens.json", "chat_template.jinja"}
    folder = make_tiny_llama(tmp_path_factory.mktemp("same"), vocab=VOCAB, max_context=MAX_CONTEXT)
    assert files["tokenizer.json"] == (folder / "tokenizer.json").read_bytes()
    current = (await at.stub.GetInfo(pb.GetInfoRequest())).tokenizer_digest
    assert [piece async for piece in at.stub.GetTokenizer(pb.GetTokenizerRequest(known_digest=current))] == []


async def test_watch_load_speaks_at_once_and_at_every_change(suite: Suite) -> None:
    at = suite.engines[0]
    request = pb.WatchLoadRequest()
    request.min_interval.FromMilliseconds(10)
    call = at.stub.WatchLoad(request, timeout=30)
    first = await asyncio.wait_for(call.read(), 5)
    assert first.pages.total == 600
    assert not first.draining
    await generate(suite, at, prompt_of(40, 1), max_tokens=200)
    seen = [first]
    while not (idle(seen[-1]) and seen[-1].step_count >= first.step_count + 200):
        seen.append(await call.read())
        assert seen[-1] != seen[-2], "one message for each change"
    assert any(report.running_sequence_count == 1 and report.context_token_count > 40 for report in seen)
    assert [report.step_count for report in seen] == sorted(report.step_count for report in seen)
    call.cancel()
    request.min_interval.FromMilliseconds(9)
    with failing(grpc.StatusCode.INVALID_ARGUMENT, "BAD_REQUEST"):
        await at.stub.WatchLoad(request).read()


# --- prefix cache events ----------------------------------------------------------------------------------------


class Mirror:
    """What a reader of the events knows."""

    def __init__(self, at: Engine) -> None:
        self._call = at.stub.WatchKvEvents(pb.WatchKvEventsRequest(), timeout=60)
        self.blocks: list[bytes] = []
        self.removed: list[bytes] = []
        self.sequence = 0

    async def begin(self) -> Mirror:
        """Reads the snapshot."""
        while True:
            event = await self._call.read()
            assert event.snapshot
            assert not event.removed
            self.sequence = event.sequence
            self.blocks += [block.value for block in event.stored]
            if event.snapshot_complete:
                assert len(set(self.blocks)) == len(self.blocks)
                return self

    async def follow(self) -> None:
        """Reads one change."""
        event = await self._call.read()
        assert not event.snapshot
        assert event.sequence == self.sequence + 1
        self.sequence = event.sequence
        for block in event.removed:
            self.blocks.remove(block.value)
            self.removed.append(block.value)
        for block in event.stored:
            assert block.value not in self.blocks
            self.blocks.append(block.value)

    def close(self) -> None:
        self._call.cancel()


async def snapshot(at: Engine) -> Mirror:
    mirror = await Mirror(at).begin()
    mirror.close()
    return mirror


async def test_kv_events_name_the_blocks(suite: Suite) -> None:
    at = suite.engines[0]
    digest = (await at.stub.GetInfo(pb.GetInfoRequest())).model_digest
    mirror = await Mirror(at).begin()
    before = set(mirror.blocks)
    expected: set[bytes] = set()
    for salt in ("", "tenant ü"):
        prompt = prompt_of(100, 2)
        result = await generate(suite, at, prompt, max_tokens=30, salt=salt)
        # The last token was never an input: it has no KV.
        tokens = [*prompt, *result.token_ids][:-1]
        hashes = block_hashes(tokens, PAGE_SIZE, hash_seed(digest, salt))
        assert len(hashes) == 8
        while not set(hashes) <= set(mirror.blocks):
            await mirror.follow()
        assert [block for block in mirror.blocks if block in hashes] == hashes, "each after its predecessor"
        expected |= set(hashes)
    assert set(mirror.blocks) - before == expected
    await wait_for_load(at, idle)
    fresh = await snapshot(at)
    assert (fresh.sequence, set(fresh.blocks)) == (mirror.sequence, set(mirror.blocks))
    mirror.close()


async def test_kv_events_tell_of_evictions(suite: Suite) -> None:
    at = suite.engines[2]
    mirror = await Mirror(at).begin()
    for seed in range(8):
        await generate(suite, at, prompt_of(100, 100 + seed), max_tokens=10)
    await wait_for_load(at, idle)
    fresh = await snapshot(at)
    while mirror.sequence < fresh.sequence:
        await mirror.follow()
    mirror.close()
    assert mirror.removed, "24 pages cannot hold eight prompts"
    assert set(mirror.blocks) == set(fresh.blocks)
    assert len(fresh.blocks) == (await load(at)).pages.cached
    assert (await generate(suite, at, prompt_of(100, 100), max_tokens=2)).timing.matched_token_count == 0


# --- reservations -----------------------------------------------------------------------------------------------


async def test_list_reservations(suite: Suite) -> None:
    at = suite.engines[1]
    prompt = prompt_of(100, 3)
    mine = await prep_recv(suite, at, prompt, 100, cache_salt="list")
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
    request.lease.FromSeconds(5)
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


async def test_release_without_publishing_frees(suite: Suite) -> None:
    sender, at = suite.engines[:2]
    prompt, before = prompt_of(100, 5), (await wait_for_load(at, idle)).pages
    prepared = await prep_recv(suite, at, prompt, 100)
    assert (await load(at)).pages.held == before.held + 7
    await remote_send(suite, sender, prompt, prepared.address)
    assert await release(at, prepared.address) == 0
    after = (await wait_for_load(at, idle)).pages
    assert (after.free, after.cached) == (before.free, before.cached)
    assert await release(at, prepared.address) == 0, "idempotent"
    assert (await generate(suite, at, prompt)).timing.matched_token_count == 0


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
    for seed in range(20):  # every time: a committed send is known to the receiver before its sender says so
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
    async with asyncio.timeout(10):
        while ranges((info := await info_of(at, prepared.address)).committed) != [(41, 100)]:
            pass
    assert info.state in (pb.RESERVATION_STATE_RESERVED, pb.RESERVATION_STATE_FILLING)
    await send_range(suite, one, prompt, prepared.address, 0, 41)
    async with asyncio.timeout(10):
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


async def full(suite: Suite, at: Engine, seed: int) -> list[kv.KvAddress]:
    """Two reservations of the small engine, which leave no room for another."""
    await wait_for_load(at, idle)
    return [(await prep_recv(suite, at, prompt_of(120, seed + i), 120)).address for i in range(2)]


def waiting_request(suite: Suite, seed: int, wait_ms: int) -> pb.PrepRecvRequest:
    request = pb.PrepRecvRequest(
        owner_id=OWNER, request_id=suite.new_id(), prompt_token_ids=prompt_of(100, seed), end=100
    )
    request.max_wait.FromMilliseconds(wait_ms)
    return request


async def test_prep_recv_waits_for_pages(suite: Suite) -> None:
    at = suite.engines[2]
    held = await full(suite, at, 300)
    # They are served in order of arrival.
    calls = [asyncio.ensure_future(prep_recv_of(at, waiting_request(suite, 310 + i, 30_000))) for i in range(2)]
    for _ in range(20):
        assert len(await reservations(at)) == 2
    assert not any(call.done() for call in calls)
    await release(at, held[0])
    served = await asyncio.wait_for(asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED), 10)
    (first,) = served[0]
    assert len(first.result().address.shards[0].page_ids) == 7
    await release(at, held[1])
    answers = await asyncio.wait_for(asyncio.gather(*calls), 10)
    assert {info.reservation_id for info in await reservations(at)} == {a.address.reservation_id for a in answers}
    for answer in answers:
        await release(at, answer.address)
    await wait_for_load(at, idle)


async def prep_recv_of(at: Engine, request: pb.PrepRecvRequest) -> pb.PrepRecvResponse:
    return await at.stub.PrepRecv(request, timeout=60)


async def test_prep_recv_is_refused_when_no_pages_come(suite: Suite) -> None:
    at = suite.engines[2]
    held = await full(suite, at, 320)
    with failing(grpc.StatusCode.RESOURCE_EXHAUSTED, "NO_PAGES") as at_once:
        await prep_recv(suite, at, prompt_of(100, 330), 100)
    assert at_once.retry_delay_s is not None
    began = time.monotonic()
    with failing(grpc.StatusCode.RESOURCE_EXHAUSTED, "NO_PAGES") as later:
        await at.stub.PrepRecv(waiting_request(suite, 330, 300), timeout=30)
    assert 0.29 <= time.monotonic() - began < 10
    assert later.retry_delay_s is not None
    assert later.retry_delay_s > 0
    # A longest prompt still runs: reservations never take its pages.
    assert len((await generate(suite, at, prompt_of(118, 331), max_tokens=10)).token_ids) == 10
    # A waiter that is aborted leaves the queue.
    request = waiting_request(suite, 332, 30_000)
    waiting = asyncio.ensure_future(prep_recv_of(at, request))
    for _ in range(20):  # round trips on the same connection: it has arrived
        assert len(await reservations(at)) == 2
    assert not waiting.done()
    await at.stub.Abort(pb.AbortRequest(owner_id=OWNER, request_id=request.request_id))
    with failing(grpc.StatusCode.CANCELLED):
        await waiting
    for address in held:
        await release(at, address)
    await wait_for_load(at, idle)


# --- abort ------------------------------------------------------------------------------------------------------


async def test_abort_ends_reservations_and_generations(suite: Suite) -> None:
    at, prompt = suite.engines[1], prompt_of(50, 400)
    request = pb.PrepRecvRequest(owner_id=OWNER, request_id="aborted", prompt_token_ids=prompt, end=50)
    prepared = await at.stub.PrepRecv(request)
    await at.stub.Abort(pb.AbortRequest(owner_id="other", request_id="aborted"))
    assert len(await reservations(at)) == 1, "another owner's request is another request"
    await at.stub.Abort(pb.AbortRequest(owner_id=OWNER, request_id="aborted"))
    assert await reservations(at) == []
    with failing(grpc.StatusCode.ABORTED, "RESERVATION_GONE"):
        await remote_send(suite, suite.engines[0], prompt, prepared.address)
    start = pb.StartGenerateRequest(owner_id=OWNER, request_id="running", prompt_token_ids=prompt)
    start.sampling.max_tokens, start.sampling.ignore_eos = 1900, True
    call = at.stub.StartGenerate(start, timeout=60)
    assert (await call.read()).token_ids
    await at.stub.Abort(pb.AbortRequest(owner_id=OWNER, request_id="running"))
    last = None
    while isinstance(message := await call.read(), pb.StartGenerateResponse):
        last = message
    assert last is not None
    assert last.finish_reason == 3, "FINISH_REASON_CANCELLED"
    await at.stub.Abort(pb.AbortRequest(owner_id=OWNER, request_id="running"))
    await wait_for_load(at, idle)
