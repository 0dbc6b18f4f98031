"""What the router adds to a request's time to first token, at half of the load that it can take and nearly alone.

Percentiles of calls through it minus those of direct calls. Differences of single pairs are shown beside: at the tail
they say how much two calls differ that meet the same arrivals, which two direct ones do as well.
"""

from __future__ import annotations

import os
import random
import time
from dataclasses import replace

from bench.router.affinity import own_core
from bench.router.calls import Open, Stream, closed_loop, direct, open_loop, through
from bench.router.figures import Figure, percentile
from bench.router.streams import direct_session, through_session
from bench.router.suite import Stubs
from services.cli.client import wait_serving
from services.rpc.channel import make_channel
from services.rpc.heap import settle_heap

NUM_TOKENS = 16
STEP_MS = 5.0
PERIOD_S = 1.5  # for which one arm is measured before the other
_WAYS = {"": "over Session", "calls_": "a call a request", "own_core_": "over Session to a router on a core of its own"}


async def measure(stubs: Stubs, rounds: int) -> list[Figure]:
    """Requests of 16 tokens arrive as a Poisson process, at the router and then, at the same times, at the engine: over
    one Session each, as a call each, and over Session once more with routers on a core where nothing else runs."""
    stub = stubs.start_stub(step_ms=STEP_MS, name="latency")
    router = stubs.start_roomy_router([stub], name="latency-router")
    relay = stubs.start_relay(stub)
    for process in (router, relay):
        await wait_serving(process.address, 60)
    async with (
        make_channel(router.address) as to_router,
        make_channel(relay.address) as to_relay,
        make_channel(stub.address) as to_stub,
        through_session(to_router) as routed,
        through_session(to_relay) as relayed,
        direct_session(to_stub) as plain,
    ):
        settle_heap()  # nor may a collection here be taken for the router's
        over_session = await _compared("", [routed, relayed, plain, plain], rounds)
        calls = [through(to_router), through(to_relay), direct(to_stub), direct(to_stub)]
        by_calls = await _compared("calls_", calls, rounds)
        with own_core([router.pid, relay.pid], [os.getpid(), stub.pid]):
            alone = await _compared("own_core_", [routed, relayed, plain, plain], rounds)
    for process in (router, relay, stub):
        process.terminate()
    return over_session + by_calls + alone


async def _compared(prefix: str, ways: list[Open], rounds: int) -> list[Figure]:
    """Figures of the router, a relay and, twice, an engine. Those without a prefix have aims."""
    full_rate = await _full_rate(ways[0])
    routed, relayed, plain, again = await _in_turn(ways, full_rate / 2, rounds)
    light = await _in_turn(ways[:3], full_rate / 20, rounds)
    at = f"{_WAYS[prefix]}, {full_rate / 2:.0f} requests/s, half of what it takes"
    aims = (None, None) if prefix else (0.5, 2.0)
    figures = [
        Figure("added_ms_p50", f"added to the first token, {at}: median, ms", _added_ms(routed, plain, 0.5), aims[0]),
        Figure("added_ms_p99", "the same, 99th percentile", _added_ms(routed, plain, 0.99), aims[1]),
        Figure("added_pair_ms_p99", "99th percentile of differences of pairs", _pair_ms(routed, plain, 0.99)),
        Figure("direct_pair_ms_p99", "the same of two direct requests", _pair_ms(again, plain, 0.99)),
        Figure("direct_ms_p50", "first token of a direct request at that load, median, ms", _ms(plain, 0.5)),
        Figure("direct_ms_p99", "the same, 99th percentile", _ms(plain, 0.99)),
        Figure(
            "relay_added_ms_p50",
            "added by a relay without policy, check, text or account: median, ms",
            _added_ms(relayed, plain, 0.5),
        ),
        Figure("relay_added_ms_p99", "the same, 99th percentile", _added_ms(relayed, plain, 0.99)),
        Figure(
            "light_added_ms_p50",
            "added at a twentieth of what it takes, median, ms",
            _added_ms(light[0], light[2], 0.5),
        ),
        Figure("light_added_ms_p99", "the same, 99th percentile", _added_ms(light[0], light[2], 0.99)),
        Figure("light_relay_added_ms_p50", "median of the relay", _added_ms(light[1], light[2], 0.5)),
    ]
    return [replace(figure, key=prefix + figure.key) for figure in figures]


async def _full_rate(start: Open) -> float:
    """Requests/s that so many clients get who ask again and again, once warm."""
    for _ in range(2):
        begin = time.perf_counter()
        await closed_loop(start, NUM_TOKENS, concurrency=64, num_requests=512)
    return 512 / (time.perf_counter() - begin)


async def _in_turn(ways: list[Open], rate: float, rounds: int) -> list[list[Stream]]:
    """The streams of each way, those of equal index for equal arrivals. Who begins a round changes."""
    found: list[list[Stream]] = [[] for _ in ways]
    source = random.Random(0)
    for number in range(rounds):
        arrivals, at_s = list[float](), source.expovariate(rate)
        while at_s < PERIOD_S:
            arrivals.append(at_s)
            at_s += source.expovariate(rate)
        for turn in range(len(ways)):
            way = (number + turn) % len(ways)
            found[way] += await open_loop(ways[way], NUM_TOKENS, arrivals)
    return found


def _added_ms(routed: list[Stream], direct: list[Stream], share: float) -> float:
    return _ms(routed, share) - _ms(direct, share)


def _pair_ms(ones: list[Stream], others: list[Stream], share: float) -> float:
    """Of differences between streams of equal arrivals."""
    differences = [one.first_s - other.first_s for one, other in zip(ones, others, strict=True)]
    return percentile(differences, share) * 1e3


def _ms(streams: list[Stream], share: float) -> float:
    return percentile([stream.first_s for stream in streams], share) * 1e3
