"""Pushes within one service against one copy of the same bytes by as many threads of one process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from services.cli.fleet import Fleet
from services.cli.kvbench.pools import BenchPool, PoolSize
from services.cli.kvbench.values import Comparison
from services.rpc.channel import make_channel

# Llama 3.1 8B in bfloat16, which has 64 KiB a page of a layer, and SmolLM2-135M in float32, which has 24 KiB.
SHAPES = {"": PoolSize(32, 8, 128, 16, 96, 2), "_24k": PoolSize(30, 3, 64, 16, 256, 4)}


async def measure_copying(rounds: int, threads: int) -> dict[str, Comparison]:
    """shm_over_memcpy and scattered_over_contiguous, and both again for pages of 24 KiB.

    A push goes through gRPC, grant and commit of a real service; its time is from the call to the last message.
    Scattered: the pages are in random order on both sides.
    """
    found: dict[str, Comparison] = {}
    with Fleet() as fleet:
        service = fleet.start_kvtransfer(extra=["--copy-threads", str(threads)])
        for suffix, size in SHAPES.items():
            async with make_channel(service.address) as channel:
                sender, receiver = BenchPool(channel, size), BenchPool(channel, size)
                try:
                    await sender.open()
                    await receiver.open()
                    found |= await _compare(sender, receiver, rounds, threads, suffix)
                finally:
                    sender.close()
                    receiver.close()
    return found


async def _compare(
    sender: BenchPool, receiver: BenchPool, rounds: int, threads: int, suffix: str
) -> dict[str, Comparison]:
    sender.memory[:] = 1
    pages = list(range(sender.size.pages))
    random = np.random.default_rng(0)
    copied: list[float] = []
    pushed: list[float] = []
    scattered: list[float] = []
    with ThreadPoolExecutor(threads) as pool:
        for number in range(rounds + 1):
            taken = (
                _copy_s(pool, threads, sender, receiver),
                await push_s(sender, receiver, pages, pages),
                await push_s(sender, receiver, random.permutation(pages).tolist(), random.permutation(pages).tolist()),
            )
            if number:  # the first round warms up
                for times, seconds in zip((copied, pushed, scattered), taken, strict=True):
                    times.append(seconds)
    kib, num_bytes = sender.size.page_bytes >> 10, sender.size.num_bytes
    return {
        f"shm_over_memcpy{suffix}": Comparison(
            f"shm, {kib} KiB pages", "push", f"copy, {threads} threads", pushed, copied, 0.8, True, num_bytes
        ),
        f"scattered_over_contiguous{suffix}": Comparison(
            f"scattered, {kib} KiB pages", "scattered push", "push", scattered, pushed, 1.3, False, num_bytes
        ),
    }


async def push_s(sender: BenchPool, receiver: BenchPool, sources: Sequence[int], targets: Sequence[int]) -> float:
    """Seconds of one push of so many pages."""
    address = await receiver.grant(targets)
    begin = time.perf_counter()
    await sender.push(sources, address)
    elapsed = time.perf_counter() - begin
    await receiver.revoke(address)
    return elapsed


def _copy_s(pool: ThreadPoolExecutor, threads: int, sender: BenchPool, receiver: BenchPool) -> float:
    """Seconds that numpy takes between the same two memories, shared evenly among the threads."""
    source, target = sender.memory, receiver.memory
    bounds = np.linspace(0, len(source), threads + 1).astype(int).tolist()

    def copy(index: int) -> None:
        np.copyto(target[bounds[index] : bounds[index + 1]], source[bounds[index] : bounds[index + 1]])

    begin = time.perf_counter()
    list(pool.map(copy, range(threads)))
    return time.perf_counter() - begin
