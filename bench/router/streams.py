"""Many requests over one stream, of a router or of an engine, as bench/router/calls.py has them by calls."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
from microserve.engine.v1 import engine_pb2, engine_pb2_grpc
from microserve.router.v1 import router_pb2, router_pb2_grpc

from bench.router.calls import Open, engine_request, router_request

Messages = asyncio.Queue[Any]  # of one answer; None after the last


@asynccontextmanager
async def through_session(channel: grpc.aio.Channel) -> AsyncIterator[Open]:
    """Session of a router."""
    stub = router_pb2_grpc.RouterServiceStub(channel)

    def command(number: int, num_tokens: int) -> router_pb2.SessionRequest:
        call = router_pb2.GenerateCall(call_id=number, request=router_request(num_tokens))
        return router_pb2.SessionRequest(generate=call)

    def outputs(frame: router_pb2.SessionResponse) -> Iterator[tuple[int, Any, bool]]:
        for output in frame.outputs:
            assert not output.HasField("error"), output.error.message
            yield output.call_id, output.response, output.last

    async with _session(stub.Session(), command, outputs) as start:
        yield start


@asynccontextmanager
async def direct_session(channel: grpc.aio.Channel) -> AsyncIterator[Open]:
    """Session of an engine."""
    stub = engine_pb2_grpc.EngineServiceStub(channel)

    def command(number: int, num_tokens: int) -> engine_pb2.SessionRequest:
        return engine_pb2.SessionRequest(start=engine_request(number, num_tokens))

    def outputs(frame: engine_pb2.SessionResponse) -> Iterator[tuple[int, Any, bool]]:
        for output in frame.outputs:
            assert not output.HasField("error"), output.error.message
            yield int(output.request_id), output.output, bool(output.output.finish_reason)

    async with _session(stub.Session(), command, outputs) as start:
        yield start


@asynccontextmanager
async def _session(
    call: Any, command: Callable[[int, int], Any], outputs: Callable[[Any], Iterator[tuple[int, Any, bool]]]
) -> AsyncIterator[Open]:
    """Starts requests over an open call. `command` makes one of a number and the tokens wanted; `outputs` gives
    (number, message, whether it is the last) of each piece in a frame."""
    answers: dict[int, Messages] = {}
    numbers, commands, wake = itertools.count(), deque[Any](), asyncio.Event()

    def start(num_tokens: int) -> AsyncIterator[Any]:
        number = next(numbers)
        messages: Messages = asyncio.Queue()
        answers[number] = messages
        commands.append(command(number, num_tokens))
        wake.set()
        return _until_none(messages)

    async def write() -> None:
        while True:
            while commands:
                await call.write(commands.popleft())
            wake.clear()
            await wake.wait()

    async def read() -> None:
        async for frame in call:
            for number, message, last in outputs(frame):
                answers[number].put_nowait(message)
                if last:
                    answers.pop(number).put_nowait(None)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(write()), group.create_task(read())]
        try:
            yield start
        finally:
            for task in tasks:
                task.cancel()
            call.cancel()


async def _until_none(messages: Messages) -> AsyncIterator[Any]:
    while (message := await messages.get()) is not None:
        yield message
