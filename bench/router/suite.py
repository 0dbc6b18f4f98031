"""Stub engines and routers as processes, and what they cost."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from services.cli.fleet import Fleet
from services.cli.process import ServiceProcess

_TICKS = os.sysconf("SC_CLK_TCK")
# Enough for every load here: it is the forwarding that is measured, and overload by a router of its own.
_ROOM = ("--max-requests", "8192", "--max-queued", "4096", "--prompt-queue", "1000")


class Stubs(Fleet):
    """A fleet whose engines compute nothing."""

    def start_stub(
        self, *, step_ms: float = 0.0, batch: int = 1024, tokens: int = 1, name: str = "stub"
    ) -> ServiceProcess:
        """bench/router/stub.py says what the options mean."""
        options = ["--name", name, "--step-ms", str(step_ms), "--batch", str(batch), "--tokens", str(tokens)]
        return self._start_module("bench.router.stub", name, options)

    def start_http_stub(self, *, step_ms: float) -> ServiceProcess:
        """bench/router/http_stub.py."""
        return self._start_module("bench.router.http_stub", "http-stub", ["--step-ms", str(step_ms)])

    def start_other(self, python: str, module: str, worker: str, port: int) -> ServiceProcess:
        """A router of somebody else's before one worker; it says nothing when it is ready."""
        command = [python, "-m", f"{module}.launch_router", "--worker-urls", f"http://{worker}"]
        command += ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port())]
        command += ["--policy", "round_robin", "--log-level", "error"]
        return self._launch("router", module, command, threads=1)

    def start_relay(self, engine: ServiceProcess) -> ServiceProcess:
        """bench/router/relay.py in front of a stub."""
        return self._start_module("bench.router.relay", "relay", ["--engine", engine.address])

    def start_roomy_router(
        self,
        engines: Sequence[ServiceProcess],
        *,
        name: str = "router",
        listen: str = "127.0.0.1:0",
        extra: Sequence[str] = (),
    ) -> ServiceProcess:
        """A data parallel router that refuses nothing."""
        return self.start_router(engines, "data_parallel", name=name, listen=listen, extra=[*_ROOM, *extra])

    def _start_module(self, module: str, name: str, options: Sequence[str]) -> ServiceProcess:
        command = [sys.executable, "-P", "-m", module, *options, "--lifeline-fd", str(self._lifeline)]
        return self._launch("engine", name, command, threads=1)


def free_port() -> int:
    """A port that was free just now, for programs that cannot choose one themselves."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def cpu_s(pid: int) -> float:
    """Seconds of CPU time that a process has used, its threads together."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


@dataclass(frozen=True, slots=True)
class Cost:
    """What something took: seconds of the clock and of a process's CPU time."""

    wall_s: float
    cpu_s: float


class Stopwatch:
    """Measures the cost of a block in the processes of these ids."""

    def __init__(self, *pids: int) -> None:
        self._pids = pids

    def __enter__(self) -> Stopwatch:
        self._cpu_s, self._wall_s = sum(map(cpu_s, self._pids)), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.cost = self.stop()

    def stop(self) -> Cost:
        """What the block has cost so far."""
        return Cost(time.perf_counter() - self._wall_s, sum(map(cpu_s, self._pids)) - self._cpu_s)
