"""One service as a child process: its READY line, its log, its death."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, Thread

from services.cli.errors import ServiceFailed

_TAIL_BYTES = 16_384
# A process that has left the group may hold the pipe for ever; all others have been killed.
_LAST_WORDS_S = 1.0


@dataclass(frozen=True, slots=True)
class Ready:
    """What a service said of itself when it was ready."""

    service: str
    address: str
    metrics: str | None
    after_s: float  # from its start


class ServiceProcess:
    """A started service. `address` and `metrics` wait for READY; everything else answers at once.

    The process leads a group of its own, so that Ctrl-C reaches only the launcher, and holds the read end of the
    launcher's lifeline. What it started and left in that group ends with it.
    """

    def __init__(
        self,
        service: str,
        name: str,
        command: Sequence[str],
        log_path: Path,
        environment: Mapping[str, str],
        lifeline: int,
    ) -> None:
        self.service = service
        self.name = name
        self.log_path = log_path
        self.command = tuple(command)
        self.environment = dict(environment)
        self._started_at = time.monotonic()
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self.environment,
                pass_fds=(lifeline,),
                process_group=0,
            )
        self.pid = self._process.pid
        # Several threads wait for the end. Whoever holds this may reap, and nobody signals a group that is reaped.
        self._reaping = Lock()
        # Readable once the process has ended, however; never reaped by anybody but us, so never somebody else's.
        self._pidfd = os.pidfd_open(self.pid)
        self.ready: Future[Ready] = Future()
        # Running: who stops waiting for it does not cancel it for the others.
        self.ready.set_running_or_notify_cancel()
        # It also keeps the pipe empty, so that a service that prints can never block.
        self._reader = Thread(target=self._read_stdout, name=f"stdout of {name}", daemon=True)
        self._reader.start()

    @property
    def address(self) -> str:
        """host:port of its gRPC server."""
        return self.wait_ready().address

    @property
    def metrics(self) -> str | None:
        """host:port of its /metrics, None if it serves none."""
        return self.wait_ready().metrics

    @property
    def has_been_ready(self) -> bool:
        """Whether it came to its READY line."""
        return self.ready.done() and self.ready.exception() is None

    def wait_ready(self, timeout_s: float = 300.0) -> Ready:
        """Waits for the READY line. ServiceFailed if the process ends first or takes too long."""
        try:
            return self.ready.result(timeout_s)
        except FutureTimeout:
            raise ServiceFailed(f"{self.name} was not ready in {timeout_s:g} s", self.log_tail()) from None

    def fileno(self) -> int:
        """A descriptor that becomes readable when the process ends, for select and event loops."""
        return self._pidfd

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        with self._reaping:
            return self._reap()

    def wait(self, timeout_s: float | None = None) -> int:
        """Waits for the end and returns the exit code. TimeoutError."""
        code = self.poll()
        if code is not None:
            return code
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        if not poller.poll(None if timeout_s is None else timeout_s * 1000):
            raise TimeoutError(f"{self.name} still runs after {timeout_s:g} s")
        with self._reaping:
            self._reap()
            return self._process.wait()

    def terminate(self) -> None:
        """Asks it to drain and end (SIGTERM)."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """Ends it and whatever it started, at once (SIGKILL to its group)."""
        self._signal(signal.SIGKILL)

    def pause(self) -> None:
        """Stops it where it stands (SIGSTOP), as a stuck process would be."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Lets it go on (SIGCONT)."""
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """Frees what the launcher holds of a process that has ended. Takes a moment: not for an event loop."""
        self.wait()
        self._reader.join(_LAST_WORDS_S)
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def log_tail(self, lines: int = 20) -> str:
        """The last lines of its log; none if somebody removed it."""
        try:
            with self.log_path.open("rb") as log:
                log.seek(max(0, self.log_path.stat().st_size - _TAIL_BYTES))
                text = log.read().decode(errors="replace")
        except FileNotFoundError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    def failure(self) -> ServiceFailed:
        """Why it ended, for the person who started it. Waits for the end, which must be near."""
        code = self.wait()
        tail = self.log_tail()
        if code == 2 and tail:
            # By the rule for all services: it could not start, and its last line says why.
            return ServiceFailed(tail.splitlines()[-1])
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        return ServiceFailed(f"{self.name} ended {how}", tail)

    def _signal(self, number: signal.Signals) -> None:
        with self._reaping:
            # Not yet reaped (poll is None), so the group still is this process's own.
            if self._reap() is None:
                os.killpg(self.pid, number)

    def _reap(self) -> int | None:
        """Exit code, None while it runs. Called with `_reaping` held."""
        if self._process.returncode is None:
            if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                return None
            # Dead but not reaped, so the group still is its own: nothing that it leaves there may hold pipe or port.
            os.killpg(self.pid, signal.SIGKILL)
        return self._process.poll()

    def _read_stdout(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                word, _, rest = line.partition(b" ")
                if word == b"READY" and not self.ready.done():
                    said = json.loads(rest)
                    after_s = time.monotonic() - self._started_at
                    self.ready.set_result(Ready(said["service"], said["address"], said.get("metrics"), after_s))
        if not self.ready.done():
            self.ready.set_exception(self.failure())
