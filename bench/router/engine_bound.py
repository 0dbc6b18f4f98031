"""Throughput through the router over throughput without it, where engines are the bound."""

from __future__ import annotations

import random
from statistics import median

from bench.router.calls import Open, direct, through, work_through
from bench.router.figures import Figure
from bench.router.suite import Stopwatch, Stubs
from services.cli.client import wait_serving
from services.rpc.channel import make_channel

STEP_MS, BATCH = 10.0, 16
SHORTEST, LONGEST, CONCURRENCY, NUM_REQUESTS = 16, 112, 24, 96


async def measure(stubs: Stubs, rounds: int) -> list[Figure]:
    """More requests at once than the engine takes, so that it never runs out of work by itself."""
    stub = stubs.start_stub(step_ms=STEP_MS, batch=BATCH, name="bound")
    router = stubs.start_roomy_router([stub], name="bound-router")
    await wait_serving(router.address, 60)
    source = random.Random(0)
    ratios, rates = list[float](), list[float]()
    async with make_channel(router.address) as to_router, make_channel(stub.address) as to_stub:
        for _ in range(rounds):
            lengths = [source.randint(SHORTEST, LONGEST) for _ in range(NUM_REQUESTS)]
            rates.append(await _tokens_per_s(through(to_router), lengths))
            ratios.append(rates[-1] / await _tokens_per_s(direct(to_stub), lengths))
    for process in (router, stub):
        process.terminate()
    return [
        Figure(
            "through_over_direct",
            f"tokens/s through the router over direct, an engine of {BATCH} sequences and {STEP_MS:g} ms a step",
            median(ratios),
            0.98,
            at_least=True,
        ),
        Figure("through_tokens_per_s", "tokens/s through the router then", median(rates)),
    ]


async def _tokens_per_s(start: Open, lengths: list[int]) -> float:
    with Stopwatch() as watch:
        streams = await work_through(start, lengths, concurrency=CONCURRENCY)
    return sum(stream.num_tokens for stream in streams) / watch.cost.wall_s
