"""The stub engines that the router is measured over: every token comes once, however they are read."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from microserve.engine.v1.engine_pb2_grpc import add_EngineServiceServicer_to_server

from bench.router import http_calls, http_stub
from bench.router.affinity import own_core
from bench.router.calls import Open, closed_loop, direct, open_loop, read, through
from bench.router.figures import Figure, Report, percentile
from bench.router.streams import direct_session, through_session
from bench.router.stub import SERVICE, Stub
from services.router.app import Router
from services.router.config import RouterConfig
from services.rpc.channel import make_channel
from services.rpc.server import Server, ServerConfig


@asynccontextmanager
async def arms(
    step_s: float = 0.0, batch: int = 4, tokens: int = 1, *, streams: bool = False
) -> AsyncIterator[tuple[Open, Open]]:
    """(through a router, direct) to one stub, by calls or over a stream each."""
    server, stub = (
        Server(ServerConfig(listen="127.0.0.1:0", metrics_port=None), "engine"),
        Stub("a", step_s, batch, tokens),
    )
    add_EngineServiceServicer_to_server(stub, server.grpc)
    steps = asyncio.create_task(stub.run())
    address = await server.start()
    await server.set_serving(SERVICE, True)
    router = Router(RouterConfig(listen="127.0.0.1:0", engine=(address,)))
    joined = asyncio.Event()
    await router.start()
    router.registry.on_change(lambda: joined.set() if router.registry.models() else None)
    if not router.registry.models():
        await asyncio.wait_for(joined.wait(), 60)
    async with make_channel(router.addresses.grpc) as to_router, make_channel(address) as to_stub:
        if streams:
            async with through_session(to_router) as routed, direct_session(to_stub) as plain:
                yield routed, plain
        else:
            yield through(to_router), direct(to_stub)
    await router.close()
    await server.stop(0)
    steps.cancel()


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("tokens", [1, 8])
async def test_both_ways_give_every_token_once(tokens: int, streams: bool) -> None:
    async with arms(tokens=tokens, streams=streams) as both:
        for start in both:
            streams = await closed_loop(start, 37, concurrency=9, num_requests=12)
            assert [stream.num_tokens for stream in streams] == [37] * 12
            assert all(stream.first_s <= stream.total_s for stream in streams)


async def test_arrivals_do_not_wait_for_those_before() -> None:
    async with arms() as (start, _):
        streams = await open_loop(start, 3, [0.0] * 6)
        assert [stream.num_tokens for stream in streams] == [3] * 6


async def test_who_leaves_makes_room() -> None:
    async with arms(step_s=0.001, batch=1) as both:
        for start in both:
            leaving = start(1 << 20)
            async for _ in leaving:
                break
            leaving.cancel()
            assert (await read(start, 5)).num_tokens == 5


async def test_events_of_a_streamed_completion_are_counted() -> None:
    server = await asyncio.start_server(lambda reader, writer: http_stub.serve(reader, writer, 0.0), "127.0.0.1", 0)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        streams = await http_calls.closed_loop(address, 7, concurrency=3, num_requests=5)
    assert [stream.num_messages for stream in streams] == [7] * 5
    assert all(0 < stream.first_s <= stream.total_s for stream in streams)


def test_percentiles_and_aims() -> None:
    assert percentile([3.0, 1.0, 2.0, 4.0], 0.5) == 3.0
    assert percentile([1.0], 0.99) == 1.0
    assert Figure("a", "", 0.5, 0.5).reached
    assert Figure("a", "", 0.5, 0.6, at_least=True).reached is False
    assert Report([Figure("a", "", 0.5), Figure("b", "", 2.0)]).flat() == {"a": 0.5, "b": 2.0}


def test_a_measured_process_has_a_core_that_the_others_leave_alone() -> None:
    command = [sys.executable, "-c", "input()"]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE) as measured,
        subprocess.Popen(command, stdin=subprocess.PIPE) as other,
    ):
        before = os.sched_getaffinity(measured.pid)
        with own_core([measured.pid], [other.pid]):
            mine, theirs = os.sched_getaffinity(measured.pid), os.sched_getaffinity(other.pid)
            assert (mine == theirs == before) if len(before) == 1 else (len(mine) == 1 and mine | theirs == before)
            assert len(before) == 1 or not mine & theirs
        assert os.sched_getaffinity(measured.pid) == os.sched_getaffinity(other.pid) == before
        for process in (measured, other):
            process.communicate(b"\n")
