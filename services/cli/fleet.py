"""The services of one machine as child processes. The only place that knows their command lines.

    with Fleet() as fleet:
        kvtransfer = fleet.start_kvtransfer()
        engines = [fleet.start_engine(f"engine-{i}", model, kvtransfer) for i in range(2)]
        router = fleet.start_router(engines, policy="disaggregated")
        router.address                                   # waits for READY

Nothing outlives the fleet: leaving the block stops all; if this process is killed, the services see the end of the
lifeline pipe and stop by themselves.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import microserve

import services
from services.cli.process import ServiceProcess

LOOPBACK = "127.0.0.1:0"
_STOP_ORDER = ("router", "engine", "kvtransfer")
_STOP_TIMEOUT_S = 10.0
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def core_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


class Fleet:
    """Starts services and stops them. Each start_ returns at once; `address` of the result waits for READY.

    `extra` of a start_ ends the command line, and wins over what else stands there. Logs lie in `folder`, which close()
    removes unless it was given.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        grace_s: float = 5.0,
        package: str = "services",
        within: Sequence[str] = (),
    ) -> None:
        """`grace_s`: seconds that calls under way may take to end when a service is asked to stop. `package` holds
        the modules kvtransfer, engine and router to run. `within`: a command that runs the command behind it, for
        instance in a network namespace."""
        self._own_folder = folder is None
        self.folder = folder or Path(tempfile.mkdtemp(prefix="microserve-"))
        self.processes: list[ServiceProcess] = []
        self._grace_s = grace_s
        self._package = package
        self._within = within
        self._lifeline, self._lifeline_end = os.pipe()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start_kvtransfer(
        self, name: str = "kvtransfer", *, listen: str = LOOPBACK, extra: Sequence[str] = ()
    ) -> ServiceProcess:
        """Starts a KV transfer service; one serves all engines of the machine."""
        return self._start("kvtransfer", name, ["--listen", listen, *extra])

    def start_engine(
        self,
        name: str,
        model: Path | str,
        kvtransfer: ServiceProcess | str | None,
        *,
        threads: int = 1,
        dtype: str = "float32",
        device: str = "cpu",
        listen: str = LOOPBACK,
        extra: Sequence[str] = (),
    ) -> ServiceProcess:
        """Starts an engine. `kvtransfer` None gives it a private pool: it then serves data parallel only."""
        options = ["--name", name, "--model", str(model), "--kvtransfer", _address(kvtransfer)]
        options += ["--listen", listen, "--threads", str(threads), "--dtype", dtype, "--device", device]
        return self._start("engine", name, [*options, *extra], threads)

    def start_router(
        self,
        engines: Sequence[ServiceProcess | str],
        policy: str | Path,
        *,
        name: str = "router",
        listen: str = LOOPBACK,
        http_listen: str = LOOPBACK,
        extra: Sequence[str] = (),
    ) -> ServiceProcess:
        """Starts a router over `engines`, waiting for their addresses. `policy`: a name or a Python file."""
        options = ["--listen", listen, "--http-listen", http_listen, "--policy", str(policy)]
        for engine in engines:
            options += ["--engine", _address(engine)]
        return self._start("router", name, [*options, *extra])

    def start_again(self, ended: ServiceProcess) -> ServiceProcess:
        """Starts a service that has ended once more, with the same options, at the addresses it had. It takes its
        place; closing `ended`, which may take a moment, is the caller's from then on. OSError: nothing has changed."""
        command = list(ended.command)
        # One that never was ready has told of no addresses; those of its own start hold.
        if ended.has_been_ready:
            said = ended.wait_ready()
            for option, address in (("--listen", said.address), ("--http-listen", said.metrics)):
                if option in command and address is not None:
                    command[command.index(option) + 1] = address
        again = ServiceProcess(ended.service, ended.name, command, ended.log_path, ended.environment, self._lifeline)
        self.processes[self.processes.index(ended)] = again
        return again

    def stop(self, *, timeout_s: float = _STOP_TIMEOUT_S) -> None:
        """Stops all, users before what they use. What has not ended in time is killed. Exit codes stay readable
        until close()."""
        deadline = time.monotonic() + timeout_s
        for service in _STOP_ORDER:
            wave = [process for process in self.processes if process.service == service]
            for process in wave:
                process.terminate()
            for process in wave:
                try:
                    process.wait(max(0.0, deadline - time.monotonic()))
                except TimeoutError:
                    process.kill()
        for process in self.processes:
            process.wait()

    def kill(self) -> None:
        """Kills all at once. May be called from another thread while stop() waits."""
        for process in reversed(self.processes):
            process.kill()

    def close(self) -> None:
        """Stops all and frees everything. Idempotent."""
        self.stop()
        for process in self.processes:
            process.close()
        self.processes.clear()
        for descriptor in (self._lifeline, self._lifeline_end):
            if descriptor >= 0:
                os.close(descriptor)
        self._lifeline = self._lifeline_end = -1
        if self._own_folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, service: str, name: str, options: Sequence[str], threads: int = 1) -> ServiceProcess:
        # -P: a file in the working directory that is named like a module must not be taken for it.
        command = [*self._within, sys.executable, "-P", "-m", f"{self._package}.{service}"]
        # Of an option given twice the later one counts, and that is the caller's.
        command += ["--lifeline-fd", str(self._lifeline), "--grace-s", str(self._grace_s), *options]
        return self._launch(service, name, command, threads)

    def _launch(self, service: str, name: str, command: Sequence[str], threads: int) -> ServiceProcess:
        log_path = self.folder / f"{name}.log"
        process = ServiceProcess(service, name, command, log_path, _environment(threads), self._lifeline)
        self.processes.append(process)
        return process


def _address(service: ServiceProcess | str | None) -> str:
    if service is None:
        return "none"
    return service if isinstance(service, str) else service.address


def _environment(threads: int) -> dict[str, str]:
    """Ours, with the same code on the path and with thread pools that leave the other engines their cores."""
    roots = [str(Path(package.__path__[0]).parent) for package in (services, microserve)]
    inherited = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([*dict.fromkeys(roots), *([inherited] if inherited else [])])
    # gRPC's core tells of every GOAWAY and reconnect on stderr, which is our log.
    own = {"PYTHONPATH": path, "GRPC_VERBOSITY": "ERROR"}
    return {**os.environ, **dict.fromkeys(_THREAD_VARIABLES, str(threads)), **own}
