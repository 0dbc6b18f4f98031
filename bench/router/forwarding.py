"""What it costs to forward: messages and tokens for each second of a core that the router uses."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from statistics import median

import grpc.aio

from bench.router.calls import Open, closed_loop, through
from bench.router.figures import Figure
from bench.router.streams import through_session
from bench.router.suite import Stopwatch, Stubs
from services.cli.client import wait_serving
from services.cli.process import ServiceProcess
from services.rpc.channel import make_channel

STREAMS = 32
STEPS = 300
STEP_MS = 3.0  # 32 streams of it are more than the router can forward one by one


async def measure(stubs: Stubs, rounds: int) -> list[Figure]:
    """Long streams through the router, and through bench/router/relay.py, which does next to nothing."""
    ones = stubs.start_stub(step_ms=STEP_MS, name="ones")
    eights = stubs.start_stub(step_ms=STEP_MS, tokens=8, name="eights")
    router, wide = (stubs.start_roomy_router([stub], name=f"to-{stub.name}") for stub in (ones, eights))
    relay = stubs.start_relay(ones)
    messages, relayed, tokens, a_second = list[float](), list[float](), list[float](), list[float]()
    over_session = list[float]()
    await _forward(router, STEPS, [])
    for _ in range(rounds):
        messages.append((await _forward(router, STEPS, a_second))[0])
        relayed.append((await _forward(relay, STEPS, []))[0])
        over_session.append((await _forward(router, STEPS, [], through_session))[0])
        tokens.append((await _forward(wide, 8 * STEPS, []))[1])
    for process in (router, wide, relay, ones, eights):
        process.terminate()
    ratio = median(one / other for one, other in zip(messages, relayed, strict=True))
    return [
        Figure(
            "client_messages_per_s_core",
            "messages to clients, most of one token, a second of its CPU time",
            median(messages),
            8_000,
            at_least=True,
        ),
        Figure("client_messages_per_s", "the same a second of the clock, with the cores shared", median(a_second)),
        Figure(
            "relay_messages_per_s_core", "the same of a relay without policy, check, text or account", median(relayed)
        ),
        Figure("messages_over_relay", "router over relay", ratio),
        Figure(
            "session_messages_per_s_core",
            "pieces of answers over one Session, most of one token, a second of its CPU time",
            median(over_session),
        ),
        Figure(
            "forwarded_tokens_per_s_core",
            "tokens a second of its CPU time where engines give eight at once",
            median(tokens),
            50_000,
            at_least=True,
        ),
    ]


@asynccontextmanager
async def _by_calls(channel: grpc.aio.Channel) -> AsyncIterator[Open]:
    yield through(channel)


async def _forward(
    process: ServiceProcess,
    num_tokens: int,
    a_second: list[float],
    way: Callable[[grpc.aio.Channel], AbstractAsyncContextManager[Open]] = _by_calls,
) -> tuple[float, float]:
    """(messages, tokens) a second of the process's CPU time; appends messages a second of the clock."""
    await wait_serving(process.address, 60)
    async with make_channel(process.address) as channel, way(channel) as start:
        with Stopwatch(process.pid) as watch:
            streams = await closed_loop(start, num_tokens, concurrency=STREAMS, num_requests=STREAMS)
    num_messages = sum(stream.num_messages for stream in streams)
    a_second.append(num_messages / watch.cost.wall_s)
    return num_messages / watch.cost.cpu_s, sum(stream.num_tokens for stream in streams) / watch.cost.cpu_s
