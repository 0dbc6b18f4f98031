"""Pushes between two services against iperf3 over the same link: loopback, one connection each."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket

from services.cli.errors import CliError
from services.cli.fleet import Fleet
from services.cli.kvbench.copying import SHAPES, push_s
from services.cli.kvbench.pools import BenchPool
from services.cli.kvbench.values import Comparison
from services.rpc.channel import make_channel

HOST = "127.0.0.1"
_TIMEOUT_S = 60.0


def missing() -> str | None:
    """Why it cannot be measured here."""
    return None if shutil.which("iperf3") else "iperf3 is not installed"


async def measure_network(rounds: int) -> dict[str, Comparison]:
    """tcp_over_iperf: speed of a push, from the call to the last message, over what iperf3's receiver reports for as
    many bytes. Rounds in turn."""
    size = SHAPES[""]
    with Fleet() as fleet:
        services = [fleet.start_kvtransfer(f"kvtransfer-{name}") for name in ("sender", "receiver")]
        async with make_channel(services[0].address) as here, make_channel(services[1].address) as there:
            sender, receiver = BenchPool(here, size), BenchPool(there, size)
            try:
                await sender.open()
                await receiver.open()
                sender.memory[:] = 1
                pages = list(range(size.pages))
                pushed, streamed = [], []
                for number in range(rounds + 1):
                    taken = await push_s(sender, receiver, pages, pages), await _iperf_s(size.num_bytes)
                    if number:  # the first round warms up
                        pushed.append(taken[0])
                        streamed.append(taken[1])
            finally:
                sender.close()
                receiver.close()
    tcp = Comparison("tcp, loopback", "push", "iperf3", pushed, streamed, 0.85, True, size.num_bytes)
    return {"tcp_over_iperf": tcp}


async def _iperf_s(num_bytes: int) -> float:
    """Seconds that iperf3 takes for so many bytes."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = str(probe.getsockname()[1])
    server = await _start("iperf3", "--server", "--one-off", "--bind", HOST, "--port", port, "--forceflush")
    try:
        assert server.stdout is not None
        async with asyncio.timeout(_TIMEOUT_S):
            while b"listening" not in (line := await server.stdout.readline()):
                if not line:
                    raise CliError("iperf3 does not start as a server")
            client = await _start(
                "iperf3", "--client", HOST, "--port", port, "--bytes", str(num_bytes), "--parallel", "1", "--json"
            )
            answer, _ = await client.communicate()
            await server.communicate()
        received = json.loads(answer)["end"]["sum_received"]
        return float(num_bytes / (received["bits_per_second"] / 8))
    finally:
        if server.returncode is None:
            server.kill()
            await server.wait()


async def _start(*command: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
