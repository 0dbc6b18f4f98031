"""What only a session can: many sequences on one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
from microserve.engine.v1 import engine_pb2 as pb

from services.engine.core.api import Cancel, Drain, RequestKey, StartGenerate
from services.engine.front import streams
from services.engine.front.session import RefusedStart, SessionCommand, converse
from services.engine.front.streams import Streams
from tests.engine.front.harness import OWNER, Served, output, serve, start_request


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serve() as served:
        yield served


async def write(call: grpc.aio.StreamStreamCall, *ids: str, **fields: object) -> None:
    for request_id in ids:
        await call.write(pb.SessionRequest(start=start_request(request_id, **fields)))


async def test_one_frame_carries_the_step_of_all_sequences(served: Served) -> None:
    call = served.stub.Session()
    await write(call, "a", "b", "c")
    commands = [await served.engine.next(StartGenerate) for _ in "abc"]
    served.engine.step(*(output(command, index) for index, command in enumerate(commands)))
    frame = await call.read()
    assert [(entry.request_id, list(entry.output.token_ids)) for entry in frame.outputs] == [
        ("a", [0]),
        ("b", [1]),
        ("c", [2]),
    ]
    call.cancel()


async def test_a_cancelled_sequence_says_so_and_the_others_go_on(served: Served) -> None:
    call = served.stub.Session()
    await write(call, "a", "b")
    first, second = [await served.engine.next(StartGenerate) for _ in "ab"]
    for request_id in ("unknown", "a"):
        await call.write(pb.SessionRequest(cancel=pb.CancelCall(request_id=request_id)))
    assert await served.engine.next(Cancel) == Cancel(first.key)
    served.engine.step(output(first, finish_reason="CANCELLED"), output(second, 4))
    assert len((await call.read()).outputs) == 2
    call.cancel()


async def test_a_second_start_of_a_name_does_not_end_the_first(served: Served) -> None:
    call = served.stub.Session()
    await write(call, "a", "a")
    command = await served.engine.next(StartGenerate)
    (refusal,) = (await call.read()).outputs
    assert refusal.error.reason == "SEQUENCE_EXISTS"
    served.engine.step(output(command, 9, finish_reason="STOP"))
    (last,) = (await call.read()).outputs
    assert list(last.output.token_ids) == [9]
    call.cancel()


async def test_a_session_has_one_owner(served: Served) -> None:
    call = served.stub.Session()
    await write(call, "a")
    await write(call, "b", owner_id="somebody else")
    (refusal,) = (await call.read()).outputs
    assert (refusal.request_id, refusal.error.reason) == ("b", "BAD_REQUEST")
    call.cancel()


async def test_a_client_that_writes_no_more_still_reads_to_the_end(served: Served) -> None:
    call = served.stub.Session()
    await write(call, "a")
    await call.done_writing()
    command = await served.engine.next(StartGenerate)
    served.engine.step(output(command, 1))
    await call.read()
    served.engine.step(output(command, 2, finish_reason="STOP"))
    assert list((await call.read()).outputs[0].output.token_ids) == [2]
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK


async def test_the_end_of_the_stream_cancels_all_of_its_sequences_and_no_other(served: Served) -> None:
    mine, other = served.stub.Session(), served.stub.Session()
    await write(mine, "a", "b")
    await write(other, "c")
    keys = {(await served.engine.next(StartGenerate)).key for _ in "abc"}
    mine.cancel()
    cancelled = {(await served.engine.next(Cancel)).key for _ in "ab"}
    assert keys - cancelled == {RequestKey(OWNER, "c")}
    assert served.engine.untaken(Cancel) == 0
    other.cancel()


async def test_idle_sessions_end_when_the_engine_has_drained(served: Served) -> None:
    call = served.stub.Session()
    await write(call, "a")
    command = await served.engine.next(StartGenerate)
    draining = asyncio.create_task(served.engine.front.drain())
    drain = await served.engine.next(Drain)
    served.engine.step(output(command, 1, finish_reason="STOP"))
    assert (await call.read()).outputs
    drain.reply(None)
    await draining
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK


async def test_starts_are_read_no_faster_than_their_refusals_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_UNTAKEN", 3)
    num_read = 0

    async def commands() -> AsyncIterator[SessionCommand]:
        nonlocal num_read
        for index in range(100):
            num_read += 1
            yield RefusedStart(str(index), ValueError())  # type: ignore[arg-type]

    with Streams(lambda command: None).caller() as caller:
        frames = converse(commands(), caller)
        taken = 0
        async for frame in frames:
            assert num_read - taken <= 3
            taken += len(frame.outputs)
        assert taken == 100


async def test_a_reader_that_fails_ends_the_session_with_its_failure() -> None:
    async def commands() -> AsyncIterator[SessionCommand]:
        raise RuntimeError("a bug")
        yield

    with Streams(lambda command: None).caller() as caller, pytest.raises(RuntimeError):
        await anext(converse(commands(), caller))
