"""PrepRecv and RemoteSend on a session: what calls of their own give, with many at once on one stream."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace

import grpc
import grpc.aio
import pytest
from microserve.engine.v1 import engine_pb2 as pb
from prometheus_client import REGISTRY

from services.engine.core import api
from services.engine.core.api import RequestKey
from services.engine.errors import NoPages
from services.engine.front import session_verbs, streams
from services.engine.front.limits import MAX_NAME_CHARACTERS
from services.engine.front.streams import Streams, VerbAnswer
from services.protocol.address import KvShard
from services.protocol.timing import Timing
from services.rpc.status import from_rpc_error
from tests.engine.front.harness import OWNER, Served, output, serve, start_request
from tests.engine.front.session_calls import RESERVED, answer_of, by_itself, command
from tests.engine.front.test_servicer import ADDRESS, BAD, prep, seconds, send


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serve() as served:
        yield served


async def test_answers_are_those_of_calls(served: Served) -> None:
    call = served.stub.Session()
    for request, kind, result in (
        (prep(lease=seconds(2), max_wait=seconds(0.5)), api.PrepRecv, RESERVED),
        (send(request_id="r2", cache_salt="salt", attempt=3), api.RemoteSend, Timing(transferred_bytes=99)),
    ):
        await call.write(command(request))
        in_session = await served.engine.next(kind)
        in_session.reply(result)
        answer = await answer_of(call)
        alone = asyncio.ensure_future(by_itself(served, request))
        asked = await served.engine.next(kind)
        asked.reply(result)
        assert answer.request_id == request.request_id
        assert getattr(answer, answer.WhichOneof("result")) == await alone
        fields = [name for name in asked.__slots__ if name not in ("reply", "deadline")]
        assert [getattr(asked, name) for name in fields] == [getattr(in_session, name) for name in fields]
    call.cancel()


@pytest.mark.parametrize("case", BAD)
async def test_refusals_are_those_of_calls(served: Served, case: str) -> None:
    call = served.stub.Session()
    await call.write(command(BAD[case]))
    answer = await answer_of(call)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await by_itself(served, BAD[case])
    alone = from_rpc_error(caught.value)
    assert (answer.error.code, answer.error.reason, answer.error.message) == (alone.code, alone.reason, alone.message)
    call.cancel()


async def test_errors_of_the_engine_come_with_their_advice(served: Served) -> None:
    call = served.stub.Session()
    await call.write(command(prep()))
    (await served.engine.next(api.PrepRecv)).reply(NoPages("No pages are free.", retry_delay_s=2.0))
    error = (await answer_of(call)).error
    assert (error.code, error.reason, error.retry_delay.seconds) == (8, "NO_PAGES", 2)
    call.cancel()


async def test_without_a_transfer_service() -> None:
    async with serve(with_kvtransfer=False) as served:
        call = served.stub.Session()
        for request in (prep(), send()):
            await call.write(command(request))
            assert (await answer_of(call)).error.reason == "NO_KVTRANSFER"
        call.cancel()


async def test_no_verb_waits_for_another(served: Served) -> None:
    call = served.stub.Session()
    await call.write(command(send(request_id="slow")))
    await call.write(command(prep(request_id="quick")))
    await call.write(pb.SessionRequest(start=start_request("generated")))
    slow, quick = await served.engine.next(api.RemoteSend), await served.engine.next(api.PrepRecv)
    start = await served.engine.next(api.StartGenerate)
    served.engine.step(output(start, 7, finish_reason="STOP"))
    assert [entry.request_id for entry in (await call.read()).outputs] == ["generated"]
    quick.reply(RESERVED)
    assert (await answer_of(call)).request_id == "quick"
    slow.reply(Timing())
    assert (await answer_of(call)).request_id == "slow"
    call.cancel()


async def test_what_is_ready_at_once_comes_in_one_frame(served: Served) -> None:
    call = served.stub.Session()
    names = [f"r{index}" for index in range(5)]
    for name in names:
        await call.write(command(prep(request_id=name)))
    for asked in [await served.engine.next(api.PrepRecv) for _ in names]:
        asked.reply(RESERVED)
    assert [answer.request_id for answer in (await call.read()).answers] == names
    call.cancel()


async def test_a_retry_in_the_same_session_is_answered_too(served: Served) -> None:
    call = served.stub.Session()
    for _ in range(2):
        await call.write(command(prep()))
    for asked in [await served.engine.next(api.PrepRecv) for _ in range(2)]:
        asked.reply(RESERVED)
    answers: list[pb.VerbAnswer] = []
    while len(answers) < 2:
        answers += (await call.read()).answers
    assert answers[0] == answers[1]
    call.cancel()


async def test_a_session_has_one_owner(served: Served) -> None:
    call = served.stub.Session()
    await call.write(pb.SessionRequest(start=start_request("a")))
    await call.write(command(prep(owner_id="somebody else")))
    answer = await answer_of(call)
    assert (answer.error.reason, OWNER in answer.error.message) == ("BAD_REQUEST", True)
    call.cancel()


@pytest.mark.parametrize("name", ["", "o" * 1_000_000], ids=["no owner", "a long owner"])
async def test_a_malformed_owner_never_becomes_the_sessions(served: Served, name: str) -> None:
    call = served.stub.Session()
    for bad in (prep(owner_id=name), send(owner_id=name)):
        await call.write(command(bad))
        answer = await answer_of(call)
        assert (answer.request_id, answer.error.reason) == ("r1", "BAD_REQUEST")
        assert "owner_id" in answer.error.message
    await call.write(command(prep()))
    (await served.engine.next(api.PrepRecv)).reply(RESERVED)
    assert (await answer_of(call)).HasField("prep_recv")
    call.cancel()


async def test_names_that_are_too_long_do_not_end_the_session(served: Served) -> None:
    """Their refusals pile up while nobody reads, and would be more than a message holds if each told its name."""
    call = served.stub.Session()
    long = "r" * 500_000
    bad = [command(prep(request_id=long)), command(send(request_id=long))]
    bad += [pb.SessionRequest(start=start_request(long)), command(prep(request_id="", owner_id="x"))]
    for message in bad * 4:
        await call.write(message)
    await call.write(command(prep(request_id="good")))
    asked = await served.engine.next(api.PrepRecv)
    refused: list[pb.VerbAnswer | pb.SequenceOutput] = []
    while len(refused) < 4 * len(bad):
        frame = await call.read()
        refused += [*frame.answers, *frame.outputs]
    assert {entry.error.reason for entry in refused} == {"BAD_REQUEST"}
    assert {entry.request_id for entry in refused} == {"", "r" * MAX_NAME_CHARACTERS}
    asked.reply(RESERVED)
    assert (await answer_of(call)).request_id == "good"
    call.cancel()


async def test_a_bug_is_one_verbs_own(served: Served) -> None:
    call = served.stub.Session()
    await call.write(command(prep()))
    (await served.engine.next(api.PrepRecv)).reply("no reservation")  # type: ignore[arg-type]
    error = (await answer_of(call)).error
    assert (error.code, error.reason) == (13, "INTERNAL")
    assert "no reservation" not in error.message
    await call.write(command(prep(request_id="r2")))
    (await served.engine.next(api.PrepRecv)).reply(RESERVED)
    assert (await answer_of(call)).HasField("prep_recv")
    call.cancel()


def counted() -> Counter[tuple[str, str]]:
    """How many calls the metrics tell of, by method and code."""
    name = "microserve_rpc_seconds_count"
    samples = [sample for metric in REGISTRY.collect() for sample in metric.samples if sample.name == name]
    return Counter({(sample.labels["method"], sample.labels["code"]): int(sample.value) for sample in samples})


async def test_the_metrics_count_verbs_as_calls(served: Served) -> None:
    before, call = counted(), served.stub.Session()
    requests = [prep(), send(), send(owner_id=""), prep(request_id="r2"), send(owner_id="somebody else")]
    for request in requests:
        await call.write(command(request))
    (await served.engine.next(api.PrepRecv)).reply(NoPages("No pages are free.", retry_delay_s=2.0))
    (await served.engine.next(api.RemoteSend)).reply(Timing())
    await call.write(pb.SessionRequest(cancel=pb.CancelCall(request_id="r2")))
    num_answers = 0
    while num_answers < len(requests):
        num_answers += len((await call.read()).answers)
    prep_recv, remote_send = (f"/microserve.engine.v1.EngineService/{name}" for name in ("PrepRecv", "RemoteSend"))
    assert counted() - before == {
        (prep_recv, "RESOURCE_EXHAUSTED"): 1,
        (prep_recv, "CANCELLED"): 1,
        (remote_send, "OK"): 1,
        (remote_send, "INVALID_ARGUMENT"): 2,
    }
    call.cancel()


async def test_more_than_a_session_holds_are_refused(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_verbs, "MAX_OPEN_VERBS", 2)
    call = served.stub.Session()
    for name in "abc":
        await call.write(command(prep(request_id=name)))
    refused = await answer_of(call)
    assert (refused.request_id, refused.error.reason) == ("c", "QUEUE_FULL")
    assert refused.error.HasField("retry_delay")
    (await served.engine.next(api.PrepRecv)).reply(RESERVED)
    assert (await answer_of(call)).request_id == "a"
    await call.write(command(prep(request_id="d")))
    for _ in "bd":
        (await served.engine.next(api.PrepRecv)).reply(RESERVED)
    call.cancel()


async def test_large_answers_come_in_several_frames() -> None:
    with Streams(lambda command: None).caller() as caller:
        pages = tuple(range(streams.MAX_TAKEN_NUMBERS * 2 // 3))
        shard = KvShard("pool", (0, 1), (0, 1), pages)
        large = api.Reserved(replace(ADDRESS, shards=(shard,)), 0, 1.0, Timing())
        for name in "abc":
            caller.begin_verb()
            caller.answer(VerbAnswer(name, large))
        caller.put(api.SequenceOutput(RequestKey(OWNER, "s"), (1,)))
        names: list[str] = []
        while len(names) < 3:
            taken = await caller.take()
            assert len(taken.answers) <= 2
            names += [answer.request_id for answer in taken.answers]
        assert names == ["a", "b", "c"]
        assert taken.outputs, "what fits comes along"
