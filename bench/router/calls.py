"""The same request to a router and to an engine, and what came back."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
import grpc.aio
from microserve.engine.v1 import engine_pb2, engine_pb2_grpc
from microserve.router.v1 import router_pb2, router_pb2_grpc
from microserve.types.v1 import sampling_pb2

PROMPT = tuple(range(10, 74))

Open: TypeAlias = Callable[[int], Any]  # number of tokens wanted -> a call that streams messages with token_ids


@dataclass(frozen=True, slots=True)
class Stream:
    """One answer. Times in seconds from the call; `first_s` is infinite if nothing came."""

    first_s: float
    total_s: float
    num_messages: int
    num_tokens: int
    refused: bool = False  # RESOURCE_EXHAUSTED


def router_request(num_tokens: int) -> router_pb2.GenerateRequest:
    """The request as a router takes it."""
    return router_pb2.GenerateRequest(
        tokens=router_pb2.TokenIds(ids=PROMPT),
        sampling=sampling_pb2.SamplingParams(max_tokens=num_tokens, ignore_eos=True),
    )


def engine_request(number: int, num_tokens: int) -> engine_pb2.StartGenerateRequest:
    """The request as an engine takes it, under a number of its own."""
    return engine_pb2.StartGenerateRequest(
        owner_id="bench",
        request_id=str(number),
        prompt_token_ids=PROMPT,
        sampling=sampling_pb2.SamplingParams(max_tokens=num_tokens, ignore_eos=True),
    )


def through(channel: grpc.aio.Channel, timeout_s: float | None = None) -> Open:
    """Generate of a router, with a deadline if one is given."""
    stub = router_pb2_grpc.RouterServiceStub(channel)
    return lambda num_tokens: stub.Generate(router_request(num_tokens), timeout=timeout_s)


def direct(channel: grpc.aio.Channel) -> Open:
    """StartGenerate of an engine."""
    stub = engine_pb2_grpc.EngineServiceStub(channel)
    numbers = itertools.count()
    return lambda num_tokens: stub.StartGenerate(engine_request(next(numbers), num_tokens))


async def read(start: Open, num_tokens: int) -> Stream:
    """One request, read to its end, be it a refusal or its deadline. grpc's error for every other one."""
    begin = time.perf_counter()
    first_s, num_messages, count = float("inf"), 0, 0
    refused = False
    try:
        async for message in start(num_tokens):
            if not num_messages:
                first_s = time.perf_counter() - begin
            num_messages += 1
            count += len(message.token_ids)
    except grpc.aio.AioRpcError as error:
        refused = error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        if not refused and error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
            raise
    return Stream(first_s, time.perf_counter() - begin, num_messages, count, refused)


async def closed_loop(start: Open, num_tokens: int, *, concurrency: int, num_requests: int) -> list[Stream]:
    """So many equal requests, so many at once."""
    return await work_through(start, [num_tokens] * num_requests, concurrency=concurrency)


async def work_through(start: Open, lengths: Sequence[int], *, concurrency: int) -> list[Stream]:
    """A request for each of these numbers of tokens, so many at once."""
    streams: list[Stream] = []
    left = iter(lengths)

    async def client() -> None:
        streams.extend([await read(start, num_tokens) for num_tokens in left])

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(client())
    return streams


async def open_loop(start: Open, num_tokens: int, arrivals_s: Sequence[float]) -> list[Stream]:
    """A request at each of these times, whatever became of those before."""
    begin = time.perf_counter()

    async def client(at_s: float) -> Stream:
        await asyncio.sleep(max(0.0, begin + at_s - time.perf_counter()))
        return await read(start, num_tokens)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(client(at_s)) for at_s in arrivals_s]
    return [task.result() for task in tasks]
