"""`microserve up`: what it says, how it ends, and that nothing outlives it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from services.cli.up_options import gpu_options
from tests.cli.launched import alive, read_event, start_up, wait_dead

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_answers_serves_and_stops_on_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    with start_up(tmp_path, "m", "--engines", "2") as launcher:
        ready = read_event(launcher)
        names = [endpoint["name"] for endpoint in ready["endpoints"]]
        assert names == ["kvtransfer", "engine-0", "engine-1", "router"]
        answer = read_event(launcher)
        assert answer["text"] == "You said [b]What is the capital of France?[/b]"
        assert answer["policy"] == "disaggregated"
        launcher.send_signal(number)
        assert read_event(launcher) == {"event": "stopping"}
        out, err = launcher.communicate(timeout=60)
        assert (launcher.returncode, out, err) == (0, "", "")
        assert not any(alive(endpoint["pid"]) for endpoint in ready["endpoints"])


def test_a_long_start_says_what_it_waits_for(tmp_path: Path) -> None:
    with start_up(tmp_path, "slow", as_json=False) as launcher:
        assert launcher.stdout is not None
        said = [launcher.stdout.readline() for _ in range(2)]
        assert said[0].startswith("starting kvtransfer")
        assert said[1].startswith("kvtransfer is not ready yet; ")


def test_up_killed_leaves_no_process(tmp_path: Path) -> None:
    with start_up(tmp_path, "m") as launcher:
        ready = read_event(launcher)
        launcher.kill()
        wait_dead([endpoint["pid"] for endpoint in ready["endpoints"]])


def test_second_signal_does_not_wait_for_a_stuck_child(tmp_path: Path) -> None:
    with start_up(tmp_path, "patient") as launcher:
        pids = [endpoint["pid"] for endpoint in read_event(launcher)["endpoints"]]
        read_event(launcher)
        os.kill(pids[-1], signal.SIGSTOP)
        launcher.send_signal(signal.SIGINT)
        assert read_event(launcher) == {"event": "stopping"}
        launcher.send_signal(signal.SIGINT)
        launcher.communicate(timeout=120)  # much less than a stuck child is given
        assert launcher.returncode == 0
        assert not any(alive(pid) for pid in pids)


@pytest.mark.parametrize(
    ("model", "is_all", "line"),
    [
        ("missing", True, "microserve: fake-engine: there is no model missing\n"),
        ("bug", False, "RuntimeError: a bug while loading\n"),
    ],
)
def test_up_says_why_it_could_not_start(tmp_path: Path, model: str, is_all: bool, line: str) -> None:
    with start_up(tmp_path, model) as launcher:
        assert read_event(launcher) == {"event": "stopping"}
        _, err = launcher.communicate(timeout=60)
        assert launcher.returncode == 1
        assert err.endswith(line)
        assert (err == line) is is_all


def test_up_interrupted_before_it_serves_exits_with_130(tmp_path: Path) -> None:
    with start_up(tmp_path, "interrupt", "--engines", "1") as launcher:
        _, err = launcher.communicate(timeout=60)
        assert (launcher.returncode, err) == (130, "microserve: interrupted\n")


@pytest.mark.parametrize(
    ("device", "options"),
    [("cpu", ()), ("cuda", ("--cuda-device", "0")), ("cuda:1", ("--cuda-device", "1"))],
)
def test_the_transfer_service_is_told_of_the_engines_gpu(device: str, options: tuple[str, ...]) -> None:
    assert gpu_options(device) == options
