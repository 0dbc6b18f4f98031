"""A load on a router: so many requests at once, each with a prompt of its own, and what they took."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, quantiles

import grpc.aio
from microserve.router.v1 import router_pb2, router_pb2_grpc
from microserve.types.v1 import sampling_pb2

# Ids that any vocabulary of a real model has, clear of its special tokens.
TOKEN_IDS = range(1_000, 30_000)


@dataclass(frozen=True, slots=True)
class Load:
    """What to send."""

    request_count: int
    concurrency: int
    prompt_tokens: int
    output_tokens: int
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """One request. Times in seconds from its beginning."""

    first_token_s: float
    total_s: float
    output_tokens: int

    @property
    def per_token_s(self) -> float:
        """Mean time between output tokens after the first."""
        return (self.total_s - self.first_token_s) / max(1, self.output_tokens - 1)


@dataclass(frozen=True, slots=True)
class Result:
    """What one policy did with a load."""

    policy: str
    samples: Sequence[Sample]
    elapsed_s: float

    @property
    def tokens_per_s(self) -> float:
        """Output tokens of all requests over the time of the whole load."""
        return sum(sample.output_tokens for sample in self.samples) / self.elapsed_s

    @property
    def first_token_s(self) -> float:
        """Mean time to first token."""
        return fmean(sample.first_token_s for sample in self.samples)

    @property
    def first_token_p90_s(self) -> float:
        """Its 90th percentile."""
        return quantiles([sample.first_token_s for sample in self.samples], n=10)[-1]

    @property
    def per_token_s(self) -> float:
        """Mean time per output token."""
        return fmean(sample.per_token_s for sample in self.samples)

    @property
    def total_s(self) -> float:
        """Mean job completion time."""
        return fmean(sample.total_s for sample in self.samples)


async def run_load(channel: grpc.aio.Channel, policy: str, load: Load) -> Result:
    """Runs the whole load under one policy. A request that fails ends it with grpc's error."""
    # The policy is part of the seed: no run finds another's prompts in a prefix cache.
    source = random.Random(f"{policy} {load.seed}")
    prompts = [source.choices(TOKEN_IDS, k=load.prompt_tokens) for _ in range(load.request_count)]
    slots = asyncio.Semaphore(load.concurrency)

    async def one(prompt: list[int]) -> Sample:
        async with slots:
            return await ask(channel, policy, prompt, load.output_tokens)

    begin = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(prompt)) for prompt in prompts]
    return Result(policy, [task.result() for task in tasks], time.perf_counter() - begin)


async def ask(
    channel: grpc.aio.Channel,
    policy: str,
    prompt: Sequence[int],
    output_tokens: int,
    *,
    salt: str = "",
    timeout_s: float | None = None,
) -> Sample:
    """One request that generates exactly so many tokens. A call that fails raises grpc's error."""
    request = router_pb2.GenerateRequest(
        tokens=router_pb2.TokenIds(ids=prompt),
        sampling=sampling_pb2.SamplingParams(max_tokens=output_tokens, ignore_eos=True),
        cache_salt=salt,
    )
    begin = time.perf_counter()
    first, count = 0.0, 0
    stub = router_pb2_grpc.RouterServiceStub(channel)
    call = stub.Generate(request, metadata=(("x-microserve-policy", policy),), timeout=timeout_s)
    async for piece in call:
        if piece.token_ids and not count:
            first = time.perf_counter() - begin
        count += len(piece.token_ids)
    return Sample(first, time.perf_counter() - begin, count)
