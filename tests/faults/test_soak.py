"""32 streams at once with random cancellations, for as long as SOAK_SECONDS says: nothing lost, no leak, no hang."""

from __future__ import annotations

import asyncio
import os
import random
import time
from pathlib import Path

import pytest
from microserve.router.v1 import router_pb2 as router
from microserve.types.v1 import sampling_pb2 as sampling

from tests.e2e.suite import Suite, check_pages, idle, load, start_suite, wait_for_load
from tests.models import make_tiny_llama

pytestmark = [pytest.mark.soak, pytest.mark.timeout(0)]

SECONDS = float(os.environ.get("SOAK_SECONDS", "120"))
NUM_STREAMS = 32
MAX_TOKENS = 200
POLICIES = ["data_parallel", "disaggregated", "context_aware", "balanced:0.1", "balanced:0.5"]


async def test_soak(tmp_path: Path) -> None:
    async with start_suite(make_tiny_llama(tmp_path), page_count=1200) as suite:
        end = time.monotonic() + SECONDS
        counts = {"finished": 0, "cancelled": 0}
        clients = [asyncio.create_task(client(suite, random.Random(i), end, counts)) for i in range(NUM_STREAMS)]
        watchers = [asyncio.create_task(watch(suite, i, clients)) for i in range(2)]
        async with asyncio.timeout(SECONDS + 120):
            await asyncio.gather(*clients)
        await asyncio.gather(*watchers)
        for at in suite.engines:
            await wait_for_load(at, idle)
        print(f"soak: {counts}")
        assert counts["finished"] > NUM_STREAMS
        assert counts["cancelled"] > 0


async def client(suite: Suite, rng: random.Random, end: float, counts: dict[str, int]) -> None:
    """One stream after another; every whole one has exactly its tokens."""
    assert suite.router is not None
    shared = [rng.randrange(3, 500) for _ in range(64)] if rng.random() < 0.5 else list(range(3, 67))
    while time.monotonic() < end:
        prompt = shared[: rng.randrange(1, 64)] + [rng.randrange(3, 500) for _ in range(rng.randrange(1, 100))]
        request = router.GenerateRequest(tokens=router.TokenIds(ids=prompt))
        request.sampling.CopyFrom(sampling.SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True, temperature=1))
        metadata = (("x-microserve-policy", rng.choice(POLICIES)),)
        stream = suite.router.Generate(request, metadata=metadata, timeout=90)
        give_up_after = rng.randrange(MAX_TOKENS) if rng.random() < 0.3 else None
        received = 0
        async for message in stream:
            received += len(message.token_ids)
            if give_up_after is not None and received > give_up_after:
                stream.cancel()
                break
        if give_up_after is None:
            assert received == MAX_TOKENS
            counts["finished"] += 1
        else:
            counts["cancelled"] += 1


async def watch(suite: Suite, index: int, clients: list[asyncio.Task[None]]) -> None:
    """The page accounts add up throughout."""
    while not all(task.done() for task in clients):
        check_pages((await load(suite.engines[index].stub)).pages)
        await asyncio.wait(clients, timeout=0.5)
