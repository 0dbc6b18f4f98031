"""A service as a process: READY, signals, lifeline, exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


class Tiny:
    """tests/rpc/tiny_service.py running; stopped after the test if it still does."""

    def __init__(self, *argv: str, pass_fds: tuple[int, ...] = ()) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.rpc.tiny_service", *argv],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=pass_fds,
        )

    def ready(self) -> dict[str, Any]:
        """Waits for the READY line."""
        assert self.process.stdout is not None
        word, _, rest = self.process.stdout.readline().partition(" ")
        assert word == "READY"
        line: dict[str, Any] = json.loads(rest)
        return line

    def end(self) -> tuple[int, str]:
        """Exit code and everything on stderr, bounded."""
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors


@pytest.fixture
def tiny() -> Iterator[type[Tiny]]:
    started: list[Tiny] = []

    class Tracked(Tiny):
        def __init__(self, *argv: str, pass_fds: tuple[int, ...] = ()) -> None:
            super().__init__(*argv, pass_fds=pass_fds)
            started.append(self)

    yield Tracked
    for service in started:
        service.process.kill()
        service.process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_it_with_code_0(tiny: type[Tiny], number: signal.Signals) -> None:
    service = tiny()
    line = service.ready()
    assert line["service"] == "tiny"
    assert line["address"].startswith("127.0.0.1:")
    assert line["metrics"].startswith("127.0.0.1:")
    service.process.send_signal(number)
    assert service.end()[0] == 0


def test_port_in_use_is_one_line_and_code_2(tiny: type[Tiny]) -> None:
    address = tiny().ready()["address"]
    assert tiny("--listen", address).end() == (2, f"tiny: {address} is in use by another process\n")


def test_wrong_flag_is_one_line_and_code_2(tiny: type[Tiny]) -> None:
    assert tiny("--nonsense").end() == (2, "tiny: unrecognized arguments: --nonsense\n")


def test_lifeline_that_ends_stops_it(tiny: type[Tiny]) -> None:
    read_end, write_end = os.pipe()
    service = tiny("--lifeline-fd", str(read_end), pass_fds=(read_end,))
    os.close(read_end)
    service.ready()
    os.close(write_end)
    assert service.end()[0] == 0


def test_lifeline_that_is_no_descriptor_is_refused(tiny: type[Tiny]) -> None:
    code, errors = tiny("--lifeline-fd", "77").end()
    assert (code, errors) == (2, "tiny: --lifeline-fd 77 is not an open descriptor\n")


PROGRAM = """
import asyncio, atexit, sys, threading
from services.rpc.main import run_main

atexit.register(print, "last words")
threading.Thread(target=threading.Event().wait).start()
run_main("program", asyncio.sleep(0))
"""


@pytest.mark.parametrize("nowhere", ["exec >&-", "exec > /dev/full"])
def test_output_that_goes_nowhere_keeps_no_service_from_its_end(nowhere: str) -> None:
    shell = ["sh", "-c", f'{nowhere}; exec "$@"', "sh", sys.executable, "-c", PROGRAM]
    assert subprocess.run(shell, cwd=ROOT, timeout=60).returncode == 0


def test_output_that_was_closed_keeps_no_service_from_its_end() -> None:
    program = PROGRAM.replace("run_main(", "sys.stdout.close(); run_main(")
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60).returncode == 0


def test_the_end_does_what_was_registered_for_it_and_waits_for_no_thread() -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "last words\n", "")
