"""The router's HTTP beside that of Rust routers, where they are installed, over workers that cost nothing."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from dataclasses import dataclass
from statistics import median

from bench.router.figures import Figure, percentile
from bench.router.http_calls import closed_loop, connect
from bench.router.suite import Stopwatch, Stubs, free_port
from services.cli.client import wait_serving

# Python module -> package of the package index.
OTHERS = {"vllm_router": "vllm-router", "sglang_router": "sglang-router", "smg": "smg"}
STEP_MS, STREAMS, STEPS = 3.0, 32, 200
PAIRS = 150


@dataclass(slots=True)
class Arm:
    """One router, and what was measured of it round by round."""

    name: str
    pid: int
    address: str
    messages_per_core_s: list[float]
    requests_per_core_s: list[float]
    added_ms: list[float]


def missing(python: str) -> list[str]:
    """Packages of the others that this interpreter cannot import."""
    script = "import sys, importlib.util as u; print(*[m for m in sys.argv[1:] if u.find_spec(m) is None])"
    found = subprocess.run([python, "-c", script, *OTHERS], capture_output=True, text=True, check=True)
    return [OTHERS[module] for module in found.stdout.split()]


async def measure(stubs: Stubs, rounds: int, python: str = sys.executable) -> list[Figure]:
    """`python` has the others installed, or some of them."""
    engine, worker = stubs.start_stub(step_ms=STEP_MS), stubs.start_http_stub(step_ms=STEP_MS)
    own = stubs.start_roomy_router([engine])
    await wait_serving(own.address, 60)
    assert own.metrics is not None  # it serves HTTP
    arms = [Arm("microserve", own.pid, own.metrics, [], [], [])]
    absent = missing(python)
    for module, package in OTHERS.items():
        if package not in absent:
            port = free_port()
            process = stubs.start_other(python, module, worker.address, port)
            address = f"127.0.0.1:{port}"
            await _wait_answering(address)
            arms.append(Arm(module, process.pid, address, [], [], []))
    for _ in range(rounds):
        for arm in arms:
            await _measure(arm, worker.address)
    return [figure for arm in arms for figure in _figures(arm)]


async def _measure(arm: Arm, worker: str) -> None:
    with Stopwatch(arm.pid) as watch:
        streams = await closed_loop(arm.address, STEPS, concurrency=STREAMS, num_requests=STREAMS)
    arm.messages_per_core_s.append(sum(stream.num_messages for stream in streams) / watch.cost.cpu_s)
    with Stopwatch(arm.pid) as watch:
        streams = await closed_loop(arm.address, 1, concurrency=STREAMS, num_requests=1000)
    arm.requests_per_core_s.append(len(streams) / watch.cost.cpu_s)
    async with connect(arm.address) as routed, connect(worker) as direct:
        for _ in range(PAIRS):
            arm.added_ms.append(((await routed.read(1)).first_s - (await direct.read(1)).first_s) * 1e3)


def _figures(arm: Arm) -> list[Figure]:
    return [
        Figure(
            f"http_{arm.name}_messages_per_s_core", "events, a second of its CPU time", median(arm.messages_per_core_s)
        ),
        Figure(
            f"http_{arm.name}_requests_per_s_core", "requests of one token, the same", median(arm.requests_per_core_s)
        ),
        Figure(
            f"http_{arm.name}_added_ms_p50", "added to a lone request's first token, median, ms", median(arm.added_ms)
        ),
        Figure(f"http_{arm.name}_added_ms_p99", "the same, 99th percentile of pairs", percentile(arm.added_ms, 0.99)),
    ]


async def _wait_answering(address: str) -> None:
    """Until a completion comes back. TimeoutError."""
    async with asyncio.timeout(60):
        while True:
            try:
                async with connect(address) as connection:
                    await connection.read(1)
                return
            except OSError:
                await asyncio.sleep(0.2)
