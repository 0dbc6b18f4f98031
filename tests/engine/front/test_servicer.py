"""The unary calls and the watches of EngineService, over a scripted loop thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration
from microserve.engine.v1 import engine_pb2 as pb
from microserve.types.v1 import kv_pb2, sampling_pb2

from services.engine.convert import from_address, from_sampling
from services.engine.core import api
from services.engine.core.api import RequestKey, ReservationRef
from services.engine.errors import BadSampling
from services.engine.front.limits import MAX_SHARDS
from services.engine.sampling.params import MAX_LOGIT_BIASES
from services.protocol.address import KvAddress, KvShard
from services.protocol.ranges import RangeSet, TokenRange
from services.protocol.timing import Timing
from services.rpc.kv_messages import address_message
from tests.e2e.errors import failing
from tests.engine.front.harness import LAYOUT, OWNER, TOKENIZER_FILES, Served, load, serve

INVALID = grpc.StatusCode.INVALID_ARGUMENT
KEY = RequestKey(OWNER, "r1")
PROMPT = (1, 2, 3, 4, 5, 6, 7, 8, 9)
# Positions [4, 8): one page of four tokens.
ADDRESS = KvAddress(
    reservation_id="res",
    endpoint="127.0.0.1:1",
    epoch=b"e" * 16,
    secret=b"s" * 16,
    window=TokenRange(4, 8),
    shards=(KvShard("pool", (0, 2), (0, 1), (3,)),),
    layout=LAYOUT,
    model_digest=b"m" * 16,
    prompt_digest=b"p" * 16,
)
REFERENCE = pb.ReservationRef(reservation_id="res", secret=b"s" * 16)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serve() as served:
        yield served


def prep(**fields: object) -> pb.PrepRecvRequest:
    return pb.PrepRecvRequest(**{"owner_id": OWNER, "request_id": "r1", "prompt_token_ids": PROMPT, "end": 8, **fields})


def send(**fields: object) -> pb.RemoteSendRequest:
    defaults = {
        "owner_id": OWNER,
        "request_id": "r1",
        "prompt_token_ids": PROMPT,
        "range": kv_pb2.TokenRange(begin=4, end=8),
        "address": address_message(ADDRESS),
    }
    return pb.RemoteSendRequest(**{**defaults, **fields})


def seconds(value: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(int(value * 1e9))
    return duration


def test_an_address_survives_the_wire_and_hides_its_secret() -> None:
    assert from_address(address_message(ADDRESS)) == ADDRESS
    assert "sss" not in repr(ADDRESS)


async def test_prep_recv(served: Served) -> None:
    call = asyncio.ensure_future(_call(served.stub.PrepRecv(prep(lease=seconds(2), max_wait=seconds(0.5)))))
    command = await served.engine.next(api.PrepRecv)
    assert (command.key, command.prompt, command.end) == (KEY, PROMPT, 8)
    assert (command.lease_s, command.max_wait_s, command.cache_salt) == (2.0, 0.5, "")
    command.reply(api.Reserved(ADDRESS, 4, 2.0, Timing(matched_tokens=4)))
    reply = await call
    assert from_address(reply.address) == ADDRESS
    assert (reply.matched_token_count, reply.lease.seconds, reply.timing.matched_token_count) == (4, 2, 4)


async def test_a_client_that_leaves_prep_recv_cancels_it(served: Served) -> None:
    call = served.stub.PrepRecv(prep())
    waiting = asyncio.ensure_future(_call(call))
    await served.engine.next(api.PrepRecv)
    call.cancel()
    assert await served.engine.next(api.Cancel) == api.Cancel(KEY)
    await asyncio.gather(waiting, return_exceptions=True)


async def test_remote_send(served: Served) -> None:
    call = asyncio.ensure_future(_call(served.stub.RemoteSend(send(cache_salt="salt"), timeout=30)))
    command = await served.engine.next(api.RemoteSend)
    assert (command.range, command.address, command.attempt, command.cache_salt) == (
        TokenRange(4, 8),
        ADDRESS,
        1,
        "salt",
    )
    assert command.deadline is not None
    assert 1020 < command.deadline < 1031  # a timeout is rounded up on the wire
    command.reply(Timing(transferred_bytes=99))
    assert (await call).timing.transferred_bytes == 99


def test_biases_are_counted_before_they_are_converted() -> None:
    with pytest.raises(BadSampling, match=f"at most {MAX_LOGIT_BIASES} tokens"):
        from_sampling(sampling_pb2.SamplingParams(logit_bias=dict.fromkeys(range(MAX_LOGIT_BIASES + 1), 1.0)))


def _address(**fields: object) -> kv_pb2.KvAddress:
    address = address_message(ADDRESS)
    for name, value in fields.items():
        setattr(address, name, value)
    return address


def _without_pages() -> kv_pb2.KvAddress:
    address = address_message(ADDRESS)
    del address.shards[0].page_ids[:]
    return address


def _of_many_shards() -> kv_pb2.KvAddress:
    """An empty window, so that each of them is right by itself."""
    address = address_message(ADDRESS)
    address.window.begin = address.window.end
    del address.shards[0].page_ids[:]
    address.shards.extend([address.shards[0]] * MAX_SHARDS)
    return address


BAD = {
    "BAD_REQUEST negative lease": prep(lease=seconds(-1)),
    "INVALID_RANGE end": prep(end=10),
    "EMPTY_PROMPT": prep(prompt_token_ids=(), end=0),
    "PROMPT_TOO_LONG": prep(prompt_token_ids=(1,) * 65),
    "BAD_REQUEST epoch": send(address=_address(epoch=b"short")),
    "BAD_REQUEST secret": send(address=_address(secret=b"")),
    "BAD_REQUEST reservation": send(address=_address(reservation_id="")),
    "BAD_REQUEST endpoint": send(address=_address(endpoint="")),
    "BAD_REQUEST no layout": send(address=kv_pb2.KvAddress(reservation_id="res")),
    "BAD_REQUEST pages": send(address=_without_pages()),
    "BAD_REQUEST shards": send(address=_of_many_shards(), range=kv_pb2.TokenRange()),
    "BAD_REQUEST attempt": send(attempt=2**32 - 1),
    "INVALID_RANGE backwards": send(range=kv_pb2.TokenRange(begin=8, end=4)),
    "INVALID_RANGE more prompt than tokens": send(prompt_token_count=len(PROMPT) + 1),
    "INVALID_RANGE prompt shorter than the window": send(prompt_token_ids=PROMPT[:6], range=kv_pb2.TokenRange()),
}


@pytest.mark.parametrize("case", BAD)
async def test_bad_verbs_are_refused_before_the_loop_thread(served: Served, case: str) -> None:
    request = BAD[case]
    is_prep = isinstance(request, pb.PrepRecvRequest)
    with failing(INVALID, case.split()[0]):
        await (served.stub.PrepRecv(request) if is_prep else served.stub.RemoteSend(request))
    assert served.engine.untaken(api.PrepRecv) == served.engine.untaken(api.RemoteSend) == 0


async def test_a_range_outside_the_window(served: Served) -> None:
    with failing(grpc.StatusCode.OUT_OF_RANGE, "OUTSIDE_WINDOW"):
        await served.stub.RemoteSend(send(range=kv_pb2.TokenRange(begin=3, end=8)))


async def test_without_a_transfer_service() -> None:
    async with serve(with_kvtransfer=False) as served:
        for call in (served.stub.PrepRecv(prep()), served.stub.RemoteSend(send())):
            with failing(grpc.StatusCode.FAILED_PRECONDITION, "NO_KVTRANSFER"):
                await call
        info = await served.stub.GetInfo(pb.GetInfoRequest())
        assert (info.kvtransfer_endpoint, list(info.transports)) == ("", [])
        assert (info.max_batch_size, info.max_message_bytes) == (8, 4096)


async def test_release_renew_abort_and_list(served: Served) -> None:
    stub, engine = served.stub, served.engine
    release = asyncio.ensure_future(_call(stub.Release(pb.ReleaseRequest(reservation=REFERENCE, publish=True))))
    command = await engine.next(api.Release)
    assert (command.reservation, command.publish) == (ReservationRef("res", b"s" * 16), True)
    command.reply(32)
    assert (await release).published_token_count == 32

    renew = asyncio.ensure_future(_call(stub.Renew(pb.RenewRequest(reservation=REFERENCE))))
    renewal = await engine.next(api.Renew)
    assert renewal.lease_s is None
    renewal.reply(12.5)
    assert (await renew).lease.ToMilliseconds() == 12_500

    abort = asyncio.ensure_future(_call(stub.Abort(pb.AbortRequest(owner_id=OWNER, request_id="r1"))))
    abortion = await engine.next(api.Abort)
    assert abortion.key == KEY
    abortion.reply(None)
    await abort

    listing = asyncio.ensure_future(_call(stub.ListReservations(pb.ListReservationsRequest(owner_id=OWNER))))
    question = await engine.next(api.ListReservations)
    committed = RangeSet.of([TokenRange(4, 6)])
    question.reply((api.ReservationInfo("res", KEY, "FILLING", TokenRange(4, 8), committed, 1.5, (3,)),))
    (info,) = (await listing).reservations
    assert (info.owner_id, info.state) == (OWNER, pb.RESERVATION_STATE_FILLING)
    assert [(part.begin, part.end) for part in info.committed] == [(4, 6)]
    assert not any("secret" in field.name for field in info.DESCRIPTOR.fields)


async def test_the_tokenizer_comes_in_pieces_or_not_at_all(served: Served) -> None:
    files: dict[str, bytes] = {}
    async for piece in served.stub.GetTokenizer(pb.GetTokenizerRequest()):
        assert len(piece.data) <= 1 << 20
        files[piece.file_name] = files.get(piece.file_name, b"") + piece.data
    assert tuple(files.items()) == TOKENIZER_FILES
    known = served.stub.GetTokenizer(pb.GetTokenizerRequest(known_digest=b"t" * 16))
    assert [piece async for piece in known] == []


async def test_load_is_told_at_once_and_its_watchers_end_with_the_engine(served: Served) -> None:
    served.engine.front.on_load(load(1))
    call = served.stub.WatchLoad(pb.WatchLoadRequest(min_interval=seconds(0.01)))
    assert (await call.read()).step_count == 1
    served.engine.front.on_load(load(2, running=3))
    report = await call.read()
    assert (report.running_sequence_count, report.pages.total) == (3, 32)
    draining = asyncio.create_task(served.engine.front.drain())
    (await served.engine.next(api.Drain)).reply(None)
    await draining
    with failing(grpc.StatusCode.UNAVAILABLE, "DRAINING"):
        await call.read()


async def test_load_cannot_be_asked_for_without_a_pause(served: Served) -> None:
    with failing(INVALID, "BAD_REQUEST"):
        await served.stub.WatchLoad(pb.WatchLoadRequest(min_interval=seconds(0.001))).read()


async def test_a_reader_of_cache_events_hears_the_changes(served: Served) -> None:
    call = served.stub.WatchKvEvents(pb.WatchKvEventsRequest())
    reading = asyncio.ensure_future(call.read())
    watch = await served.engine.next(api.WatchCache)
    watch.on_event(api.CacheEvent(4, True, (), ()))
    first = await reading
    assert (first.sequence, first.snapshot, first.snapshot_complete) == (4, True, True)
    watch.on_event(api.CacheEvent(5, False, (b"n" * 16,), (b"o" * 16,)))
    change = await call.read()
    assert (change.sequence, change.stored[0].value, change.removed[0].value) == (5, b"n" * 16, b"o" * 16)
    call.cancel()
    assert (await served.engine.next(api.UnwatchCache)).watcher_id == watch.watcher_id


async def _call(call):  # type: ignore[no-untyped-def]
    """A unary call begins when it is awaited, so it needs a task of its own."""
    return await call
