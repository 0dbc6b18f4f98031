"""Layers that travel over a slow link while later ones still compute: how much of the transfer is left to wait for."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.duration_pb2 import Duration
from microserve.engine.v1 import engine_pb2
from microserve.kvtransfer.v1 import kvtransfer_pb2, kvtransfer_pb2_grpc
from microserve.types.v1 import sampling_pb2

from services.cli.errors import CliError
from services.cli.fleet import Fleet
from services.cli.kvbench.link import ShapedLink
from services.cli.kvbench.values import Overlap, Timeline
from services.cli.kvbench.verbs import Verbs
from services.rpc.channel import make_channel

# Computed in one step, so that the layers of one push follow each other; whole pages, so that all is cached after.
_TOKENS = 256
# Of the time of the computing: in the middle of what counts.
_TOTAL_OVER_PREFILL = 0.6
_OTHER = 10_000
_POLL_S = 0.004


@dataclass(frozen=True, slots=True)
class Nodes:
    """The sender's engine and service, and the receiver's engine."""

    sender: Verbs
    receiver: Verbs
    service: kvtransfer_pb2_grpc.KvTransferServiceAsyncStub


async def measure_overlap(model: Path, rounds: int) -> Overlap:
    """Real engines, each with a transfer service of its own, over tcp; the receiver's two in a network namespace.

    The link there is shaped so that the whole KV takes 0.6 of the time that computing it takes. Every round sends a new
    prompt while it is computed, and another one of the same length whose KV the sender has by then: the link is then
    the only thing to wait for. Raises CliError where no namespace can be made.
    """
    with ShapedLink() as link, Fleet() as here, Fleet(within=link.prefix) as there:
        data = {"near": ["--data-listen", f"{link.near}:0"], "far": ["--data-listen", f"{link.far}:0"]}
        services = (
            here.start_kvtransfer("kvtransfer-near", listen=f"{link.near}:0", extra=data["near"]),
            there.start_kvtransfer("kvtransfer-far", listen=f"{link.far}:0", extra=data["far"]),
        )
        options = ["--kv-memory-mib", "256", "--max-context", "1024"]
        engines = (
            here.start_engine("engine-near", model, services[0], listen=f"{link.near}:0", extra=options),
            there.start_engine("engine-far", model, services[1], listen=f"{link.far}:0", extra=options),
        )
        async with (
            make_channel(engines[0].address) as to_sender,
            make_channel(engines[1].address) as to_receiver,
            make_channel(services[0].address) as to_service,
        ):
            nodes = Nodes(
                Verbs.on(to_sender), Verbs.on(to_receiver), kvtransfer_pb2_grpc.KvTransferServiceStub(to_service)
            )
            return await _measure(nodes, link, rounds)


async def _measure(nodes: Nodes, link: ShapedLink, rounds: int) -> Overlap:
    info = await nodes.sender.stub.GetInfo(engine_pb2.GetInfoRequest())
    warm = [await _computed(nodes, seed) for seed in range(3)]
    prefill_s = statistics.median(_seconds(timing.prefill) for timing in warm)
    rate = warm[0].transferred_bytes / (_TOTAL_OVER_PREFILL * prefill_s)
    link.shape(rate)
    exposed, total, prefill = [], [], []
    for number in range(rounds):
        first, second = await _both(nodes, 100 + number)
        exposed.append(_seconds(first.transfer))
        total.append(_seconds(second.transfer))
        prefill.append(_seconds(first.prefill))
    timeline = await _timeline(nodes, 99)
    named = f"tcp, {rate / 1e6:.0f} MB/s, {_TOKENS} tokens, {warm[0].transferred_bytes / 1e6:.0f} MB"
    return Overlap(info.layout.layer_count, exposed, total, prefill, named, timeline)


async def _computed(nodes: Nodes, seed: int) -> sampling_pb2.Timing:
    prompt, salt = _prompt(seed), f"{seed}"
    request_id, prepared = await nodes.receiver.prep_recv(prompt, _TOKENS, salt)
    sent = await nodes.sender.remote_send(prompt, prepared.address, salt)
    await nodes.receiver.abort(request_id)
    return sent.timing


async def _both(nodes: Nodes, seed: int) -> tuple[sampling_pb2.Timing, sampling_pb2.Timing]:
    """A send that computes, and one that finds everything computed."""
    first = await _computed(nodes, seed)
    # Another prompt, for the receiver keeps what it got.
    other = seed + _OTHER
    await nodes.sender.generate_one(_prompt(other), f"{other}")
    second = await _computed(nodes, other)
    if second.computed_token_count:
        raise CliError("the sender has not kept what it computed: its cache is too small to measure")
    return first, second


async def _timeline(nodes: Nodes, seed: int) -> Timeline:
    """One more send, with the service asked again and again how much is in place."""
    before = await _moved(nodes.service)
    begin = time.perf_counter()
    sending = asyncio.create_task(_computed(nodes, seed))
    seen: list[tuple[float, int]] = []
    while not sending.done():
        seen.append((time.perf_counter() - begin, await _moved(nodes.service) - before))
        await asyncio.sleep(_POLL_S)
    timing = await sending
    # From the call's arrival, as the engine counts; the reservation that came before is not in it.
    end_s = seen[-1][0]
    start_s = end_s - _seconds(timing.total)
    compute_begin_s = _seconds(timing.queue)
    compute_end_s = compute_begin_s + _seconds(timing.prefill)
    landed = tuple((at - start_s, num_bytes / timing.transferred_bytes) for at, num_bytes in seen if at >= start_s)
    return Timeline(compute_begin_s, compute_end_s, _seconds(timing.transfer), landed)


async def _moved(service: kvtransfer_pb2_grpc.KvTransferServiceAsyncStub) -> int:
    stats = await service.GetStats(kvtransfer_pb2.GetStatsRequest())
    return sum(transport.bytes for transport in stats.transports)


def _prompt(seed: int) -> list[int]:
    chosen = random.Random(seed)
    return [chosen.randrange(1_000, 30_000) for _ in range(_TOKENS + 1)]


def _seconds(duration: Duration) -> float:
    return duration.ToNanoseconds() / 1e9
