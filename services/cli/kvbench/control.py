"""What the verbs cost when there is nothing to move and next to nothing to compute."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.cli.fleet import Fleet
from services.cli.kvbench.tiny_model import write_tiny_model
from services.cli.kvbench.values import Comparison
from services.cli.kvbench.verbs import Verbs
from services.rpc.channel import make_channel

# A whole number of pages, all but the last token cached at both ends.
_PROMPT = [7 + i % 200 for i in range(33)]
_SALT = "control"
_SEQUENCES_A_ROUND = 32


async def measure_control(rounds: int) -> dict[str, Comparison]:
    """control_over_empty_c1 and _c16: prep_recv, remote_send of nothing and start_generate over three empty calls.

    1 and 16 clients at once, each doing one after the other. Two real engines with a random model of one small layer,
    idle otherwise. The prompt is cached at the receiver, so that its window is empty. start_generate counts to the end
    of its stream: one token, so one step of the engine is in it. An empty call is a health check of the same engine
    over the same channel. A round's time is the mean of its sequences.
    """
    found = {}
    with Fleet() as fleet:
        model = write_tiny_model(Path(fleet.folder) / "tiny-model")
        service = fleet.start_kvtransfer()
        options = ["--kv-memory-mib", "16"]
        started = [fleet.start_engine(f"engine-{i}", model, service, extra=options) for i in range(2)]
        async with make_channel(started[0].address) as to_sender, make_channel(started[1].address) as to_receiver:
            sender, receiver = Verbs.on(to_sender), Verbs.on(to_receiver)
            health: Any = health_pb2_grpc.HealthStub(to_receiver)  # its stubs do not know its methods

            async def verbs() -> None:
                _, prepared = await receiver.prep_recv(_PROMPT, len(_PROMPT) - 1, _SALT)
                await sender.remote_send(_PROMPT, prepared.address, _SALT)
                await receiver.generate_one(_PROMPT, _SALT, prepared.address)

            async def empty() -> None:
                for _ in range(3):
                    await health.Check(health_pb2.HealthCheckRequest())

            await receiver.generate_one(_PROMPT, _SALT)
            for clients in (1, 16):
                verb_s, empty_s = [], []
                for number in range(rounds + 1):
                    taken = await _mean_s(verbs, clients), await _mean_s(empty, clients)
                    if number:  # the first round warms up
                        verb_s.append(taken[0])
                        empty_s.append(taken[1])
                found[f"control_over_empty_c{clients}"] = Comparison(
                    f"control, {clients} at once", "three verbs", "three empty calls", verb_s, empty_s, 2.0
                )
    return found


async def _mean_s(sequence: Callable[[], Awaitable[None]], clients: int) -> float:
    """Mean seconds of a sequence while so many clients do one after the other."""
    times: list[float] = []

    async def client() -> None:
        for _ in range(max(2, _SEQUENCES_A_ROUND // clients)):
            begin = time.perf_counter()
            await sequence()
            times.append(time.perf_counter() - begin)

    await asyncio.gather(*(client() for _ in range(clients)))
    return sum(times) / len(times)
