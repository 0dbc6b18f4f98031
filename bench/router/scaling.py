"""Two router processes on one port against one: messages/s, and whether each of them costs what one alone costs."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from statistics import median

from bench.router.calls import Stream, closed_loop, through
from bench.router.figures import Figure
from bench.router.suite import Stopwatch, Stubs
from services.cli.client import wait_serving
from services.cli.process import ServiceProcess
from services.rpc.channel import make_channel

CONNECTIONS, STREAMS, NUM_TOKENS = 16, 4, 200  # connections, streams of each, tokens of each
STEP_MS = 3.0


async def measure(stubs: Stubs, rounds: int) -> list[Figure]:
    """The kernel deals connections to the processes that share the port."""
    stub = stubs.start_stub(step_ms=STEP_MS)
    one = [stubs.start_roomy_router([stub], name="alone")]
    first = stubs.start_roomy_router([stub], name="first", extra=["--reuse-port"])
    two = [first, stubs.start_roomy_router([stub], name="second", listen=first.address, extra=["--reuse-port"])]
    ratios, costs, shares = list[float](), list[float](), list[float]()
    for process in (*one, *two):
        process.wait_ready()
    for _ in range(rounds):
        alone_a_second, alone_a_core, _ = await _forward(one)
        both_a_second, both_a_core, share = await _forward(two)
        ratios.append(both_a_second / alone_a_second)
        costs.append(both_a_core / alone_a_core)
        shares.append(share)
    return [
        Figure(
            "two_over_one",
            "messages/s of two processes on one port over one; stub and client share the cores",
            median(ratios),
        ),
        Figure(
            "two_over_one_per_core", "messages for each second of CPU time of two processes over one", median(costs)
        ),
        Figure("two_smaller_share", "the smaller of the two processes' shares of the work", median(shares)),
    ]


async def _forward(routers: list[ServiceProcess]) -> tuple[float, float, float]:
    """Messages a second, messages a second of CPU time, the least share of the CPU time that one of them used."""
    await wait_serving(routers[0].address, 60)
    async with AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(make_channel(routers[0].address)) for _ in range(CONNECTIONS)]
        watches = [stack.enter_context(Stopwatch(router.pid)) for router in routers]
        loads = [closed_loop(through(each), NUM_TOKENS, concurrency=STREAMS, num_requests=STREAMS) for each in channels]
        streams: list[Stream] = [stream for found in await asyncio.gather(*loads) for stream in found]
        costs = [watch.stop() for watch in watches]
    num_messages = sum(stream.num_messages for stream in streams)
    used_s = [cost.cpu_s for cost in costs]
    return num_messages / costs[0].wall_s, num_messages / sum(used_s), min(used_s) / sum(used_s)
