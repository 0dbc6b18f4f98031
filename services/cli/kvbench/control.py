"""What the verbs cost when there is nothing to move and next to nothing to compute."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.cli.fleet import Fleet
from services.cli.kvbench.routed_verbs import PROMPT, SALT, RoutedVerbs
from services.cli.kvbench.tiny_model import write_tiny_model
from services.cli.kvbench.values import Comparison
from services.cli.kvbench.verbs import TIMEOUT_S, Verbs
from services.rpc.channel import make_channel

_SEQUENCES_A_ROUND = 32
_MIN_TURNS = 8

Exchange: TypeAlias = Callable[[], Awaitable[None]]


async def measure_control(rounds: int) -> dict[str, Comparison]:
    """control_over_empty_c1 and _c16: prep_recv, remote_send of nothing and start_generate over three empty calls.

    1 client, and 16 who begin together. Two real engines with a random model of one small layer,
    idle otherwise. The prompt is cached at the receiver, so that its window is empty. start_generate counts to the end
    of its stream: one token, so one step of the engine is in it. The verbs are called with the router's own client, so
    over a session with each engine; for control_by_calls_over_empty_c1 and _c16 each is a call by itself, as other
    clients may do it. An empty call is a health check with a deadline; the three go to the engines of the verbs, in
    their order and over their channels, and take turns with them: a process that has slept for a few milliseconds
    answers half as fast, so calls in a loop would be of another kind. A round's time is the mean of its sequences.
    """
    found: dict[str, Comparison] = {}
    with Fleet() as fleet:
        model = write_tiny_model(Path(fleet.folder) / "tiny-model")
        service = fleet.start_kvtransfer()
        options = ["--kv-memory-mib", "16"]
        started = [fleet.start_engine(f"engine-{i}", model, service, extra=options) for i in range(2)]
        async with make_channel(started[0].address) as to_sender, make_channel(started[1].address) as to_receiver:
            sender, receiver = Verbs.on(to_sender), Verbs.on(to_receiver)
            # Their stubs do not know their methods.
            health: list[Any] = [health_pb2_grpc.HealthStub(channel) for channel in (to_receiver, to_sender)]

            async def calls() -> None:
                _, prepared = await receiver.prep_recv(PROMPT, len(PROMPT) - 1, SALT)
                await sender.remote_send(PROMPT, prepared.address, SALT)
                await receiver.generate_one(PROMPT, SALT, prepared.address)

            routed = await RoutedVerbs.on(to_sender, to_receiver)

            async def empty() -> None:
                for stub in (*health, health[0]):
                    await stub.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)

            await receiver.generate_one(PROMPT, SALT)
            for clients in (1, 16):
                found |= await _compared(routed.sequence, calls, empty, clients, rounds)
            await routed.close()
    return found


async def _compared(
    session: Exchange, calls: Exchange, empty: Exchange, clients: int, rounds: int
) -> dict[str, Comparison]:
    """Three ways to exchange three messages each, in turn."""
    taken = [await _mean_s((session, calls, empty), clients) for _ in range(rounds + 1)]
    session_s, calls_s, empty_s = zip(*taken[1:], strict=True)  # the first round warms up
    name, against = f"control, {clients} at once", "three empty calls"
    return {
        f"control_over_empty_c{clients}": Comparison(name, "three verbs", against, session_s, empty_s, 2.0),
        f"control_by_calls_over_empty_c{clients}": Comparison(
            name, "three verbs, a call each", against, calls_s, empty_s, 2.0
        ),
    }


async def _mean_s(sequences: Sequence[Exchange], clients: int) -> list[float]:
    """Mean seconds of each sequence, which take turns: so many clients do one at once, then all the next."""
    num_turns = max(_MIN_TURNS, _SEQUENCES_A_ROUND // clients)
    seconds = [0.0] * len(sequences)
    for _ in range(num_turns):
        for index, sequence in enumerate(sequences):
            seconds[index] += sum(await asyncio.gather(*(_seconds(sequence) for _ in range(clients))))
    return [each / (num_turns * clients) for each in seconds]


async def _seconds(sequence: Exchange) -> float:
    begin = time.perf_counter()
    await sequence()
    return time.perf_counter() - begin
