"""Processes of a suite under traffic are killed, stopped and started again at random moments, for as long as
SOAK_SECONDS says: every answer is right or a typed error in time, and in the end nothing is held or left behind.

CHAOS_SEED repeats what is done to whom; when it happens is up to the machine.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import grpc
import pytest
from microserve.engine.v1.engine_pb2_grpc import EngineServiceStub
from microserve.kvtransfer.v1 import kvtransfer_pb2 as kvtransfer
from microserve.kvtransfer.v1.kvtransfer_pb2_grpc import KvTransferServiceStub
from microserve.router.v1 import router_pb2 as router
from microserve.types.v1 import sampling_pb2 as sampling

from services.cli.process import ServiceProcess
from tests.e2e.prompts import mixed_prompts
from tests.e2e.suite import (
    Engine,
    Suite,
    generate,
    idle,
    prep_recv,
    remote_send,
    router_sees,
    start_suite,
    wait_for_load,
)
from tests.e2e.waiting import until
from tests.faults.test_kills import until_it_works
from tests.models import make_tiny_llama

pytestmark = [pytest.mark.soak, pytest.mark.timeout(0)]

SECONDS = float(os.environ.get("SOAK_SECONDS", "120"))
SEED = int(os.environ.get("CHAOS_SEED", "1"))
NUM_CLIENTS = 8
NUM_TOKENS = 24
TIMEOUT_S = 120.0
POLICIES = ["disaggregated", "context_aware", "balanced:0.5", "data_parallel"]
PROMPTS = mixed_prompts(10, 500, 300)[4:]
CODES = grpc.StatusCode
# What a caller may be told while processes die. Anything else is a fault of ours, a deadline that passes, too: all are
# far longer than anybody is gone.
EXPECTED = {CODES.UNAVAILABLE, CODES.ABORTED, CODES.RESOURCE_EXHAUSTED}


class Chaos:
    """Kills, or stops for a while, one process or two at once; each comes back before it is hit again."""

    def __init__(self, suite: Suite, rng: random.Random) -> None:
        self._suite, self._rng = suite, rng
        self._spared: set[str] = set()
        self.done: Counter[str] = Counter()

    async def run(self, end: float) -> None:
        """Two at a time do this."""
        await asyncio.gather(*(self._worker(end) for _ in range(2)))

    async def _worker(self, end: float) -> None:
        while time.monotonic() < end:
            await asyncio.sleep(self._rng.uniform(0, 3))
            free = sorted(set(self._restarts()) - self._spared)
            names = self._rng.sample(free, self._rng.choice([1, 1, 2]))
            self._spared.update(names)
            hit = self._rng.choice([self._kill, self._stop])
            await asyncio.gather(*(hit(name) for name in names))
            self._spared.difference_update(names)

    async def _kill(self, name: str) -> None:
        """And starts it again."""
        self.done[f"{name} killed"] += 1
        process, replace = self._restarts()[name]
        process.kill()
        await asyncio.to_thread(process.wait, 30)
        await asyncio.sleep(self._rng.uniform(0, 1))
        again = self._suite.fleet.start_again(process)
        await asyncio.to_thread(again.wait_ready)
        replace(again)

    async def _stop(self, name: str) -> None:
        """And lets it go on."""
        self.done[f"{name} stopped"] += 1
        process, _ = self._restarts()[name]
        process.pause()
        await asyncio.sleep(self._rng.uniform(0.1, 8))
        process.resume()

    def _restarts(self) -> dict[str, tuple[ServiceProcess, Callable[[ServiceProcess], None]]]:
        """Every process by its name, and how another one takes its place."""
        suite = self._suite
        assert suite.router_process is not None
        found: dict[str, tuple[ServiceProcess, Callable[[ServiceProcess], None]]] = {
            "router": (suite.router_process, lambda new: setattr(suite, "router_process", new))
        }
        for index, engine in enumerate(suite.engines):
            found[engine.name] = engine.process, partial(self._use_engine, index)
        for index, process in enumerate(suite.kvtransfers):
            found[process.name] = process, partial(suite.replace_kvtransfer, index)
        return found

    def _use_engine(self, index: int, process: ServiceProcess) -> None:
        self._suite.engines[index] = Engine(process, EngineServiceStub(self._suite.connect(process.address)))


async def test_whatever_dies_answers_are_right(tmp_path: Path) -> None:
    options = ["--lease-default", "10"]
    async with start_suite(
        make_tiny_llama(tmp_path), num_engines=4, num_kvtransfers=2, engine_options=options, kv_memory_mib=32
    ) as suite:
        expected = [await alone(suite, prompt) for prompt in PROMPTS]
        rng, end = random.Random(SEED), time.monotonic() + SECONDS
        chaos, outcomes = Chaos(suite, rng), Counter[str]()
        clients = [client(suite, random.Random(SEED + i), end, expected, outcomes) for i in range(NUM_CLIENTS)]
        clients += [mover(suite, random.Random(SEED - i), end, expected, outcomes) for i in range(1, 3)]
        await asyncio.gather(chaos.run(end), *clients)
        print(f"chaos: {dict(chaos.done)} {dict(outcomes)}")
        await router_sees(suite, 4)
        for sender in suite.engines:
            for receiver in suite.engines:
                if sender is not receiver:
                    salt = f"after {sender.name} {receiver.name}"
                    await until_it_works(lambda s=sender, r=receiver, t=salt: move(suite, s, r, 5, t, expected))
        for engine in suite.engines:
            await wait_for_load(engine, idle)
        for process in suite.kvtransfers:
            # A Revoke that only tidies up may still be on its way.
            await until(partial(under_way, KvTransferServiceStub(suite.connect(process.address))), 0)


async def under_way(service: KvTransferServiceStub) -> int:
    """Grants and pushes that a transfer service has."""
    stats = await service.GetStats(kvtransfer.GetStatsRequest())
    return sum(pool.grant_count + pool.push_count for pool in stats.pools)


Expected = list[tuple[list[int], list[float]]]


async def alone(suite: Suite, prompt: list[int]) -> tuple[list[int], list[float]]:
    """Tokens and their log-probabilities of one engine by itself."""
    result = await generate(suite, suite.engines[0], prompt, max_tokens=NUM_TOKENS, salt="alone")
    return result.token_ids, [each.chosen.logprob for each in result.logprobs]


async def client(suite: Suite, rng: random.Random, end: float, expected: Expected, outcomes: Counter[str]) -> None:
    """Requests through the router, one after the other."""
    while time.monotonic() < end or not outcomes["answered"]:
        number = rng.randrange(len(PROMPTS))
        salt = rng.choice(["shared", f"own {rng.random()}"])
        async with typed(outcomes):
            token_ids, logprobs = await ask(suite, PROMPTS[number], rng.choice(POLICIES), salt)
            check(token_ids, logprobs, expected[number])
            outcomes["answered"] += 1


async def ask(suite: Suite, prompt: list[int], policy: str, salt: str) -> tuple[list[int], list[float]]:
    assert suite.router is not None
    request = router.GenerateRequest(
        tokens=router.TokenIds(ids=prompt),
        sampling=sampling.SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=2),
        cache_salt=salt,
    )
    token_ids: list[int] = []
    logprobs: list[float] = []
    async for message in suite.router.Generate(
        request, metadata=(("x-microserve-policy", policy),), timeout=TIMEOUT_S, wait_for_ready=True
    ):
        token_ids.extend(message.token_ids)
        logprobs.extend(each.chosen.logprob for each in message.logprobs)
    return token_ids, logprobs


async def mover(suite: Suite, rng: random.Random, end: float, expected: Expected, outcomes: Counter[str]) -> None:
    """The verbs by hand, between any two engines."""
    while time.monotonic() < end or not outcomes["moved"]:
        sender, receiver = rng.sample(suite.engines, 2)
        async with typed(outcomes):
            await move(suite, sender, receiver, rng.randrange(len(PROMPTS)), f"move {rng.random()}", expected)
            outcomes["moved"] += 1


async def move(suite: Suite, sender: Engine, receiver: Engine, number: int, salt: str, expected: Expected) -> None:
    """KV of a prompt but its last token goes from one to the other, which then generates from it."""
    prompt = PROMPTS[number]
    prepared = await prep_recv(suite, receiver, prompt, len(prompt) - 1, lease_s=10, cache_salt=salt)
    await remote_send(suite, sender, prompt, prepared.address, cache_salt=salt)
    result = await generate(suite, receiver, prompt, address=prepared.address, max_tokens=NUM_TOKENS, salt=salt)
    check(result.token_ids, [each.chosen.logprob for each in result.logprobs], expected[number])


def check(token_ids: list[int], logprobs: list[float], expected: tuple[list[int], list[float]]) -> None:
    assert token_ids == expected[0]
    assert logprobs == pytest.approx(expected[1], abs=1e-3)


@asynccontextmanager
async def typed(outcomes: Counter[str]) -> AsyncIterator[None]:
    """A call in the block may fail, but only in these ways."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        if error.code() not in EXPECTED:
            raise
        outcomes[error.code().name] += 1
        await asyncio.sleep(0.1)  # whoever was called may be gone for a while
