"""Exceptions of handlers as clients see them, over a real connection, for all four kinds of calls."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest
from microserve.engine.v1 import engine_pb2, engine_pb2_grpc

from services.protocol import errors
from services.protocol.errors import Code, ServiceError
from services.rpc.deadline import time_left
from services.rpc.status import RemoteError, from_rpc_error, remote_errors
from tests.rpc.conftest import Serve


def leaves(root: type[ServiceError]) -> list[type[ServiceError]]:
    """Every subclass below `root` that is a concrete error."""
    below = [leaf for child in root.__subclasses__() for leaf in leaves(child)]
    return below or [root]


class Raising(engine_pb2_grpc.EngineServiceServicer):
    """Each method is one kind of call and raises what the test gave it."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    async def PrepRecv(self, request: Any, context: Any) -> Any:
        raise self.error

    async def StartGenerate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        yield engine_pb2.StartGenerateResponse(token_ids=[1])
        raise self.error

    async def Session(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:
        async for _ in request_iterator:
            raise self.error
            yield

    async def WatchLoad(self, request: Any, context: Any) -> None:
        await context.write(engine_pb2.WatchLoadResponse())
        raise self.error


async def unary(stub: Any) -> None:
    await stub.PrepRecv(engine_pb2.PrepRecvRequest())


async def generator(stub: Any) -> None:
    async for _ in stub.StartGenerate(engine_pb2.StartGenerateRequest()):
        pass


async def bidirectional(stub: Any) -> None:
    async for _ in stub.Session(iter([engine_pb2.SessionRequest()])):
        pass


async def writer(stub: Any) -> None:
    async for _ in stub.WatchLoad(engine_pb2.WatchLoadRequest()):
        pass


KINDS = [unary, generator, bidirectional, writer]


async def failure(call: Any) -> RemoteError:
    with pytest.raises(RemoteError) as caught, remote_errors():
        await call
    return caught.value


@pytest.mark.parametrize("kind", KINDS)
async def test_service_error_keeps_code_reason_text_and_delay(serve: Serve, kind: Any) -> None:
    running = await serve(Raising(errors.ReservationGone("it expired", retry_delay_s=0.25)))
    error = await failure(kind(running.stub))
    assert (error.code, error.reason) == (Code.ABORTED, "RESERVATION_GONE")
    assert (error.message, error.retry_delay_s) == ("it expired", 0.25)


async def test_every_error_of_the_protocol_crosses_the_wire(serve: Serve) -> None:
    servicer = Raising(ServiceError(""))
    running = await serve(servicer)
    for leaf in leaves(errors.ProtocolError):
        servicer.error = leaf("why")
        error = await failure(unary(running.stub))
        assert (error.code, error.reason, error.message) == (leaf.code, leaf.reason, "why")
        assert error.retry_delay_s is None


@pytest.mark.parametrize("kind", KINDS)
async def test_unknown_exception_leaks_no_text(serve: Serve, kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    running = await serve(Raising(KeyError("password=hunter2")))
    with caplog.at_level(logging.ERROR), pytest.raises(grpc.aio.AioRpcError) as caught:
        await kind(running.stub)
    assert "hunter2" not in f"{caught.value.details()}{caught.value.trailing_metadata()}"
    error = from_rpc_error(caught.value)
    assert (error.code, error.reason) == (Code.INTERNAL, "INTERNAL")
    record = next(record for record in caplog.records if record.getMessage() == "call failed")
    assert getattr(record, "fields")["failure"] in error.message  # noqa: B009
    assert "hunter2" in caplog.text


async def test_inner_cancellation_does_not_leave_the_client_waiting(serve: Serve) -> None:
    running = await serve(Raising(asyncio.CancelledError()))
    async with asyncio.timeout(60):
        error = await failure(unary(running.stub))
    assert error.code is Code.INTERNAL


async def test_abort_of_the_handler_passes(serve: Serve) -> None:
    class Aborting(engine_pb2_grpc.EngineServiceServicer):
        async def PrepRecv(self, request: Any, context: Any) -> Any:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such thing")

    error = await failure(unary((await serve(Aborting())).stub))
    assert (error.code, error.reason, error.message) == (Code.NOT_FOUND, "NOT_FOUND", "no such thing")


async def test_absent_method_is_unimplemented_and_a_bug_of_that_name_is_not(serve: Serve) -> None:
    running = await serve(Raising(NotImplementedError("aten::linear")))
    error = await failure(running.stub.GetInfo(engine_pb2.GetInfoRequest()))
    assert (error.code, error.reason) == (Code.UNIMPLEMENTED, "UNIMPLEMENTED")
    assert (await failure(unary(running.stub))).code is Code.INTERNAL


async def test_cancel_reaches_the_handler_and_deadline_is_readable(serve: Serve) -> None:
    class Waiting(engine_pb2_grpc.EngineServiceServicer):
        def __init__(self) -> None:
            self.left: asyncio.Queue[float | None] = asyncio.Queue()
            self.cancelled = asyncio.Event()

        async def PrepRecv(self, request: Any, context: Any) -> Any:
            self.left.put_nowait(time_left(context))
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled.set()

    servicer = Waiting()
    running = await serve(servicer)
    call = running.stub.PrepRecv(engine_pb2.PrepRecvRequest(), timeout=60)
    left = await servicer.left.get()
    assert left is not None
    assert 0 < left < 62  # the wire rounds up
    call.cancel()
    async with asyncio.timeout(60):
        await servicer.cancelled.wait()
    unbounded = running.stub.PrepRecv(engine_pb2.PrepRecvRequest())
    assert await servicer.left.get() is None
    unbounded.cancel()


async def test_oversized_message_is_refused_by_grpc_itself(serve: Serve) -> None:
    running = await serve(Raising(ServiceError("")), max_message_bytes=1000)
    request = engine_pb2.PrepRecvRequest(owner_id="x" * 2000)
    error = await failure(running.stub.PrepRecv(request))
    assert error.code is Code.RESOURCE_EXHAUSTED
    assert error.reason == "RESOURCE_EXHAUSTED"


async def test_long_text_is_cut_so_that_the_status_fits(serve: Serve) -> None:
    running = await serve(Raising(errors.InvalidRange("\u00e9" * 100_000)))
    error = await failure(unary(running.stub))
    assert error.reason == "INVALID_RANGE"
    assert set(error.message) == {"\u00e9"}
