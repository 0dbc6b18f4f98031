"""How verbs of a session end: cancelled, out of time, and with their stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

import grpc
import grpc.aio
import pytest
from microserve.engine.v1 import engine_pb2 as pb

from services.engine.core import api
from services.engine.core.api import RequestKey
from services.engine.front import session_verbs
from services.engine.front.session import SessionCommand, converse
from services.engine.front.streams import Streams
from services.protocol.errors import ServiceError
from services.protocol.timing import Timing
from tests.e2e.errors import failing
from tests.engine.front.harness import OWNER, Served, serve
from tests.engine.front.session_calls import RESERVED, answer_of, by_itself, command
from tests.engine.front.test_servicer import prep, seconds, send


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serve() as served:
        yield served


async def test_a_cancelled_verb_says_so_and_the_others_go_on(served: Served) -> None:
    call = served.stub.Session()
    await call.write(command(send(request_id="doomed")))
    await call.write(command(prep(request_id="spared")))
    doomed, spared = await served.engine.next(api.RemoteSend), await served.engine.next(api.PrepRecv)
    for name in ("unknown", "doomed"):
        await call.write(pb.SessionRequest(cancel=pb.CancelCall(request_id=name)))
    assert await served.engine.next(api.Cancel) == api.Cancel(doomed.key)
    answer = await answer_of(call)
    assert (answer.request_id, answer.error.code, answer.error.reason) == ("doomed", 1, "REQUEST_CANCELLED")
    spared.reply(RESERVED)
    assert (await answer_of(call)).HasField("prep_recv")
    assert served.engine.untaken(api.Cancel) == 0
    call.cancel()


async def test_the_end_of_the_stream_cancels_its_verbs_and_no_other(served: Served) -> None:
    mine, other = served.stub.Session(), served.stub.Session()
    for request in (prep(request_id="a"), send(request_id="b")):
        await mine.write(command(request))
    await other.write(command(prep(request_id="c")))
    for kind in (api.PrepRecv, api.RemoteSend, api.PrepRecv):
        await served.engine.next(kind)
    mine.cancel()
    cancelled = {(await served.engine.next(api.Cancel)).key.request_id for _ in "ab"}
    assert cancelled == {"a", "b"}
    assert served.engine.untaken(api.Cancel) == 0
    other.cancel()


async def test_the_time_of_a_verb_is_kept_both_ways(served: Served) -> None:
    """A send's by the loop thread, which is told of it; see the next test."""
    request = prep(timeout=seconds(0.001))
    call = served.stub.Session()
    await call.write(command(request))
    assert (await answer_of(call)).error.reason == "DEADLINE_EXCEEDED"
    await served.engine.next(api.Cancel)
    with failing(grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"):
        await by_itself(served, request)
    await served.engine.next(api.Cancel)
    call.cancel()


async def test_a_send_knows_its_own_deadline_and_its_calls(served: Served) -> None:
    """The earlier one, on the engine's clock, which stands at 1000."""
    call = served.stub.Session(timeout=500)
    for timeout_s, latest in ((50, 1050), (5000, 1501)):
        await call.write(command(send(timeout=seconds(timeout_s))))
        asked = await served.engine.next(api.RemoteSend)
        assert asked.deadline is not None
        assert 1000 < asked.deadline <= latest
        asked.reply(Timing())
        await answer_of(call)
    call.cancel()


@pytest.mark.parametrize("asked_for", [True, False])
async def test_a_cancellation_that_nobody_asked_for_is_a_bug(asked_for: bool) -> None:
    inner = asyncio.get_running_loop().create_future()
    waits = asyncio.Event()

    async def run() -> Timing:
        waits.set()
        return await inner  # type: ignore[no-any-return]

    with Streams(lambda command: None).caller() as caller:
        verbs = session_verbs.SessionVerbs(caller)
        verbs.begin(session_verbs.VerbCall(RequestKey(OWNER, "a"), "/Service/Method", run))
        await waits.wait()
        verbs.cancel("a") if asked_for else inner.cancel()
        (answer,) = (await caller.take()).answers
        assert isinstance(answer.result, ServiceError)
        assert answer.result.reason == ("REQUEST_CANCELLED" if asked_for else "INTERNAL")


async def test_a_session_that_is_cancelled_twice_leaves_no_verb_running() -> None:
    """The second time while its reader, which takes long to end, keeps it from its end."""
    begun, ended, reader_ends = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def run() -> Timing:
        try:
            begun.set()
            await asyncio.Event().wait()
        finally:
            ended.set()
        raise AssertionError

    async def commands() -> AsyncGenerator[SessionCommand, None]:
        yield session_verbs.VerbCall(RequestKey(OWNER, "a"), "/Service/Method", run)
        try:
            await asyncio.Event().wait()
        finally:
            reader_ends.set()
            await asyncio.Event().wait()

    with Streams(lambda command: None).caller() as caller:
        session = asyncio.ensure_future(anext(converse(commands(), caller)))
        await begun.wait()
        session.cancel()
        await reader_ends.wait()
        session.cancel()
        await asyncio.wait([session])
        await asyncio.wait_for(ended.wait(), 60)


async def test_a_client_that_writes_no_more_still_gets_its_answers(served: Served) -> None:
    call = served.stub.Session()
    await call.write(command(send()))
    await call.done_writing()
    (await served.engine.next(api.RemoteSend)).reply(Timing())
    assert (await answer_of(call)).HasField("remote_send")
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK


async def test_a_session_that_drains_still_gives_its_answers(served: Served) -> None:
    call = served.stub.Session()
    await call.write(command(prep()))
    asked = await served.engine.next(api.PrepRecv)
    draining = asyncio.create_task(served.engine.front.drain())
    (await served.engine.next(api.Drain)).reply(None)
    await draining
    asked.reply(RESERVED)
    assert (await answer_of(call)).HasField("prep_recv")
    assert await call.read() is grpc.aio.EOF
