"""Sending arrivals to a router when their time has come, whatever becomes of those before."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import grpc.aio

from bench.load import Load, Sample, ask, run_load
from bench.policies.traffic import Arrival, Mix, arrivals

TIMEOUT_S = 60.0
CALIBRATION_REQUESTS = 12
CALIBRATIONS = 3


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the suite does with a mix: requests/s when it always has enough to do, and times of a request alone."""

    rate: float
    ttft_s: float
    tpot_s: float


async def calibrate(channel: grpc.aio.Channel, mix: Mix) -> Capacity:
    """Measures it, data parallel; the rate is the median of some, since one moment of a busy machine says little."""
    rates = []
    for seed in range(CALIBRATIONS):
        load = Load(CALIBRATION_REQUESTS, CALIBRATION_REQUESTS, mix.prompt_tokens, mix.output_tokens, seed)
        busy = await run_load(channel, "data_parallel", load)
        rates.append(CALIBRATION_REQUESTS / busy.elapsed_s)
    alone = [
        await ask(channel, "data_parallel", each.prompt, each.output_tokens)
        for each in arrivals(mix, 1.0, CALIBRATIONS, "alone")
    ]
    return Capacity(
        rate=median(rates),
        ttft_s=median(sample.first_token_s for sample in alone),
        tpot_s=median(sample.per_token_s for sample in alone),
    )


async def send(
    channel: grpc.aio.Channel, policy: str, requests: Sequence[Arrival], salt: str
) -> tuple[tuple[Sample | None, ...], float]:
    """Samples in the order of the arrivals, None for what was refused or failed; and the seconds that all took."""
    begin = time.perf_counter()

    async def one(arrival: Arrival) -> Sample | None:
        await asyncio.sleep(max(0.0, begin + arrival.at_s - time.perf_counter()))
        try:
            return await ask(channel, policy, arrival.prompt, arrival.output_tokens, salt=salt, timeout_s=TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            print(f"{policy}: {error.code().name}: {error.details()}", file=sys.stderr)
            return None

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(arrival)) for arrival in requests]
    return tuple(task.result() for task in tasks), time.perf_counter() - begin
