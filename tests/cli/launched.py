"""`microserve up` over fake services: what it says, and who of its processes lives."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def start_up(folder: Path, model: str, *options: str, as_json: bool = True) -> Iterator[subprocess.Popen[str]]:
    """`microserve up` over fake services, with free ports, and with JSON events unless told not to; killed if it
    still runs at the end."""
    flags = ["--grpc-port", "0", "--http-port", "0", *(["--json"] if as_json else []), *options]
    with subprocess.Popen(
        [sys.executable, "-m", "tests.cli.fakes.up", str(folder), model, *flags],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as launcher:
        try:
            yield launcher
        finally:
            launcher.kill()  # its lifeline takes the rest


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # before it is opened, and before it is read
        return False


def wait_dead(pids: list[int], timeout_s: float = 60.0) -> None:
    """Waits for the end of processes that are not our children."""
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        ended = poller.poll(timeout_s * 1000)
        os.close(descriptor)
        assert ended, f"process {pid} still runs"


def read_event(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The next line of `up --json`."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise AssertionError(process.communicate()[1])
    event: dict[str, Any] = json.loads(line)
    return event


@contextmanager
def up_with_model(folder: Path) -> Iterator[tuple[subprocess.Popen[str], Path, dict[str, dict[str, Any]]]]:
    """`up` that serves, the folder where engines find what to do at their next start, and the endpoints by name."""
    logs, model = folder / "logs", folder / "model"
    logs.mkdir()
    model.mkdir()
    with start_up(logs, str(model)) as launcher:
        yield launcher, model, endpoints_of(read_event(launcher))


def endpoints_of(event: dict[str, Any]) -> dict[str, dict[str, Any]]:
    assert event["event"] == "ready"
    return {endpoint["name"]: endpoint for endpoint in event["endpoints"]}


def kill_and_hear(launcher: subprocess.Popen[str], endpoints: dict[str, dict[str, Any]], name: str) -> None:
    """Kills a service, which must be the next that `up` tells of."""
    os.kill(endpoints[name]["pid"], signal.SIGKILL)
    assert read_event(launcher) == {"event": "restarting", "name": name}


def stop_and_hear(launcher: subprocess.Popen[str]) -> None:
    """Stops it, which must be the next that it hears and says."""
    launcher.send_signal(signal.SIGTERM)
    assert read_event(launcher) == {"event": "stopping"}
    assert launcher.communicate(timeout=60) == ("", "")
    assert launcher.returncode == 0
