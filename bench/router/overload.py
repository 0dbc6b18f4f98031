"""Goodput under overload: requests with a deadline arrive as a Poisson process, whatever becomes of those before."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass

import grpc.aio

from bench.router.calls import Open, open_loop, through
from bench.router.figures import Figure, percentile
from bench.router.suite import Stopwatch, Stubs
from services.cli.client import wait_serving
from services.rpc.channel import make_channel

NUM_ENGINES, STEP_MS, BATCH, NUM_TOKENS = 2, 20.0, 16, 40
CAPACITY = NUM_ENGINES * BATCH / (STEP_MS / 1e3 * (NUM_TOKENS - 1))  # requests/s; the first token takes no step
LOADS = (0.5, 0.8, 1.0, 1.5, 2.0, 3.0)  # shares of it
DEADLINE_S = 3.0
PERIOD_S = 8.0


@dataclass(frozen=True, slots=True)
class Load:
    """One load: answers in time a second, and how long half of the refusals took at most."""

    share: float
    goodput: float
    refused: int
    late: int
    refusal_ms: float


async def measure(stubs: Stubs, _: int) -> list[Figure]:
    """A router with its own limits over stub engines; an answer is good if it is whole before its deadline."""
    engines = [stubs.start_stub(step_ms=STEP_MS, batch=BATCH, name=f"engine-{number}") for number in range(NUM_ENGINES)]
    router = stubs.start_router(engines, "data_parallel")
    await wait_serving(router.address, 60)
    async with make_channel(router.address) as channel:
        await _offer(channel, 1.0)
        loads = [await _offer(channel, share) for share in LOADS]
    most = max(load.goodput for load in loads)
    figures = [
        Figure(
            "goodput_at_3x_over_peak",
            f"answers within {DEADLINE_S:g} s at 3 times what {NUM_ENGINES} engines can do, over the most at any load",
            loads[-1].goodput / most,
            0.9,
            at_least=True,
        ),
        Figure("refusal_ms_p50", "time until a refusal at that load, median, ms", loads[-1].refusal_ms),
    ]
    for load in loads:
        what = (
            f"answers/s in time at {load.share:g} x {CAPACITY:.0f}/s offered; {load.refused} refused, {load.late} late"
        )
        figures.append(Figure(f"goodput_at_{load.share:g}x", what, load.goodput))
    return figures


async def _offer(channel: grpc.aio.Channel, share: float) -> Load:
    source = random.Random(0)
    arrivals, at_s = list[float](), 0.0
    while at_s < PERIOD_S:
        arrivals.append(at_s)
        at_s += source.expovariate(share * CAPACITY)
    start: Open = through(channel, timeout_s=DEADLINE_S)
    with Stopwatch() as watch:
        streams = await open_loop(start, NUM_TOKENS, arrivals)
    await asyncio.sleep(0.5)  # what was cut off at its deadline leaves the engines
    good = [stream for stream in streams if stream.num_tokens == NUM_TOKENS]
    refused = [stream for stream in streams if stream.refused]
    return Load(
        share,
        # From the first arrival to the last answer: what ends after the last arrival has the engines to itself.
        len(good) / watch.cost.wall_s,
        len(refused),
        len(streams) - len(good) - len(refused),
        percentile([stream.total_s * 1e3 for stream in refused], 0.5) if refused else 0.0,
    )
