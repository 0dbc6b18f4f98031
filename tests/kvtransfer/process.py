"""The transfer service, and engines that use its pools, as real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "gen"), os.environ.get("PYTHONPATH")])),
}


class Process:
    """A child of the test. Its first line of output says that it is ready."""

    def __init__(self, module: str, *argv: str, stdin: bool = False) -> None:
        # A file: nobody reads while the test runs, and a full pipe would stop the child.
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by end
        self.child = subprocess.Popen(
            [sys.executable, "-m", module, *argv],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        assert self.child.stdout is not None
        self.first_line = self.child.stdout.readline()

    def kill(self) -> None:
        """kill -9, and everything closed. Again is no error."""
        if not self._errors.closed:
            self.child.kill()
            self.end()

    def end(self) -> tuple[int, str]:
        """Waits for the exit, once. Returns the exit code and what it wrote on stderr."""
        self.child.communicate(timeout=60)
        self._errors.seek(0)
        with self._errors:
            return self.child.returncode, self._errors.read()


class ServiceProcess(Process):
    """`python -m services.kvtransfer` on a free port."""

    def __init__(self, *argv: str) -> None:
        listen = () if "--listen" in argv else ("--listen", "127.0.0.1:0")
        super().__init__("services.kvtransfer", *listen, *argv)
        word, _, rest = self.first_line.partition(" ")
        assert word == "READY", self.end()
        ready = json.loads(rest)
        self.address: str = ready["address"]
        self.metrics: str = ready["metrics"]

    def terminate(self) -> None:
        """SIGTERM; returns at once."""
        self.child.send_signal(signal.SIGTERM)


class EngineProcess(Process):
    """tests/kvtransfer/fake_engine.py: attaches a pool and fills it, then does as it is told."""

    def __init__(self, socket_path: str, ticket: bytes, seed: int) -> None:
        super().__init__("tests.kvtransfer.fake_engine", socket_path, ticket.hex(), str(seed), stdin=True)
        assert self.first_line == "ATTACHED\n"

    def raise_ready(self, slot: int, layers: int) -> None:
        """Returns when the counter is raised."""
        self._do(f"{slot} {layers}")

    def fork(self) -> None:
        """Leaves a child behind that keeps the engine's descriptors open, its socket too."""
        self._do("fork")

    def _do(self, line: str) -> None:
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        self.child.stdin.write(line + "\n")
        self.child.stdin.flush()
        assert self.child.stdout.readline() == "DONE\n"
