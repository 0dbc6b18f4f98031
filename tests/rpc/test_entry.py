"""Ctrl-C before a command has begun: quiet, whichever command it is and whatever it is at."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
# Presses Ctrl-C when a module is imported that stands for the rest.
INTERRUPTED_IMPORT = """
import runpy, signal, sys

command, module = sys.argv[1:]
del sys.argv[1:]

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
runpy.run_module(command, run_name="__main__")
"""
# Ignores Ctrl-C, as a shell has it for what a script puts into the background.
IN_BACKGROUND = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)" + INTERRUPTED_IMPORT
# Loads something on a thread for ever, as an engine does that has read no weights yet.
LOADING = """
import asyncio, sys, threading
from services.rpc import entry
from services.rpc.main import run_main

async def load():
    print("loading", file=sys.__stdout__, flush=True)
    await asyncio.to_thread(threading.Event().wait)

def main():
    run_main("loader", load())

sys.modules["loader"] = sys.modules["__main__"]
entry.enter("loader")
"""


def run(code: str, *argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *argv]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("command", "module"),
    [
        ("services.cli", "services.cli.up"),
        ("services.engine", "services.engine.registration"),
        ("services.kvtransfer", "services.kvtransfer.servicer"),
        ("services.router", "services.router.app"),
    ],
)
def test_interrupted_while_it_imports_it_exits_with_130(command: str, module: str) -> None:
    ended = run(INTERRUPTED_IMPORT, command, module)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


def test_in_the_background_of_a_script_it_goes_on() -> None:
    ended = run(IN_BACKGROUND, "services.router", "services.router.app")
    assert ended.returncode == 2
    assert ended.stderr.startswith("microserve-router: no engine can join")


def test_interrupted_while_it_loads_it_ends_at_once() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LOADING], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as loading:
        assert loading.stdout is not None
        assert loading.stdout.readline() == "loading\n"
        loading.send_signal(signal.SIGINT)
        assert loading.communicate(timeout=60) == ("", "")
        assert loading.returncode == 130
