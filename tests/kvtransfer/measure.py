"""How fast the shm transport is: PYTHONPATH=.:gen python -m tests.kvtransfer.measure

Prints a push's bytes a second beside np.copyto of the same bytes by the same threads, taken in turn in one process; how
long a revoke in the middle of a push takes; the time of a 64 KiB push over gRPC to a service process; and the time from
a layer's ready counter to its last byte in the receiver's pool.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from tests.kvtransfer.engine import FakeEngine, Shape
from tests.kvtransfer.port import DirectPort, GrpcPort, Port
from tests.kvtransfer.process import ServiceProcess

ROUNDS = 9
# SmolLM2-135M: 24 KiB a page of a layer; and a model with larger pages.
SHAPES = {
    "24 KiB pages": Shape(layers=30, heads=3, head_dim=64, page_size=16, pages=256),
    "128 KiB pages": Shape(layers=32, heads=8, head_dim=128, page_size=16, pages=64),
}
SMALL = Shape(layers=4, heads=2, head_dim=64, page_size=16, pages=8)


async def pair(port: Port, shape: Shape) -> tuple[FakeEngine, FakeEngine]:
    """A sender and a receiver."""
    return await FakeEngine(port, "p", shape).start(seed=1), await FakeEngine(port, "d", shape).start()


async def push_once(sender: FakeEngine, receiver: FakeEngine, name: str, from_pages: list[int]) -> float:
    """Seconds that one push of a whole pool takes, from the call to the last message."""
    tokens = len(from_pages) * sender.shape.page_size
    address = await receiver.grant(name, 0, tokens, list(range(len(from_pages))))
    begin = time.perf_counter()
    async for _ in sender.port.stream("Push", sender.order(address, 0, tokens, from_pages)):
        pass
    elapsed = time.perf_counter() - begin
    await receiver.revoke(name)
    return elapsed


def copy_once(pool: ThreadPoolExecutor, threads: int, target: np.ndarray, source: np.ndarray) -> float:
    """Seconds that np.copyto of the same bytes takes, split evenly over the threads."""
    begin = time.perf_counter()
    parts = np.linspace(0, len(source), threads + 1).astype(int)
    list(
        pool.map(lambda i: np.copyto(target[parts[i] : parts[i + 1]], source[parts[i] : parts[i + 1]]), range(threads))
    )
    return time.perf_counter() - begin


async def throughput(label: str, shape: Shape, threads: int) -> None:
    """One line: copyto, contiguous push, scattered push."""
    port = DirectPort(copy_threads=threads)
    sender, receiver = await pair(port, shape)
    size, pages = len(sender.memory), list(range(shape.pages))
    scattered = np.random.default_rng(0).permutation(shape.pages).tolist()
    seconds: dict[str, list[float]] = {"copyto": [], "contiguous": [], "scattered": []}
    with ThreadPoolExecutor(threads) as pool:
        for round_number in range(ROUNDS):
            seconds["copyto"].append(copy_once(pool, threads, receiver.memory, sender.memory))
            seconds["contiguous"].append(await push_once(sender, receiver, f"c{round_number}", pages))
            seconds["scattered"].append(await push_once(sender, receiver, f"s{round_number}", scattered))
    best = {name: statistics.median(values) for name, values in seconds.items()}
    rates = ", ".join(f"{name} {size / 1e9 / value:.2f} GB/s" for name, value in best.items())
    ratios = ", ".join(f"{best['copyto'] / best[name]:.2f}" for name in ("contiguous", "scattered"))
    print(f"{label}, {size >> 20} MiB, {threads} thread(s): {rates}; ratio to copyto {ratios}")
    for engine in (sender, receiver):
        engine.close()
    await port.close()


async def revoking(shape: Shape) -> None:
    """Revokes while copies are under way, without a wire."""
    port = DirectPort()
    sender, receiver = await pair(port, shape)
    pages, times = list(range(shape.pages)), []
    for number in range(50):
        address = await receiver.grant(f"r{number}", 0, shape.pages * shape.page_size, pages)
        push = sender.push(sender.order(address, 0, shape.pages * shape.page_size, pages))
        await push.layers(1)
        begin = time.perf_counter()
        await receiver.revoke(f"r{number}")
        times.append(time.perf_counter() - begin)
        await asyncio.gather(push.done(), return_exceptions=True)
    print(f"revoke during a push: median {statistics.median(times) * 1e3:.2f} ms, worst {max(times) * 1e3:.2f} ms")
    for engine in (sender, receiver):
        engine.close()
    await port.close()


async def latency(address: str) -> None:
    """64 KiB pushes over gRPC, one after another."""
    port = GrpcPort(address)
    sender, receiver = await pair(port, SMALL)
    assert SMALL.layers * SMALL.page_size * SMALL.layer_token_bytes == 64 << 10
    times, empty = [], []
    for number in range(200):
        target = await receiver.grant(f"r{number}", 0, 16, [0])
        order = sender.order(target, 0, 16, [1])
        begin = time.perf_counter()
        async for _ in port.stream("Push", order):
            pass
        times.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        await receiver.revoke(f"r{number}")
        empty.append(time.perf_counter() - begin)
    exposed = []
    for number in range(200):
        target = await receiver.grant(f"e{number}", 0, 16, [0])
        sender.pool.raise_ready(0, 0)
        push = sender.push(sender.order(target, 0, 16, [1], ready_slot=0))
        await push.opened()
        sender.pool.raise_ready(0, SMALL.layers)
        exposed.append((await push.done()).exposed.ToNanoseconds() / 1e6)
        await receiver.revoke(f"e{number}")
    quantiles = statistics.quantiles(times, n=100)
    print(
        f"64 KiB push over gRPC: median {statistics.median(times) * 1e3:.2f} ms, p99 {quantiles[98] * 1e3:.2f} ms; "
        f"an empty call (Revoke) {statistics.median(empty) * 1e3:.2f} ms; "
        f"ready to in place, as the service sees it, median {statistics.median(exposed):.2f} ms"
    )
    for engine in (sender, receiver):
        engine.close()
    await port.close()


async def main() -> None:
    """All figures."""
    for label, shape in SHAPES.items():
        for threads in (1, 2):
            await throughput(label, shape, threads)
    await revoking(SHAPES["128 KiB pages"])
    service = ServiceProcess()
    await latency(service.address)
    service.kill()


if __name__ == "__main__":
    asyncio.run(main())
