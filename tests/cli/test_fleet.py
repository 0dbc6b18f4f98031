"""Child processes: command lines, readiness, death, and that nothing outlives the fleet."""

from __future__ import annotations

import asyncio
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from services.cli import restarts
from services.cli.client import wait_serving
from services.cli.errors import ServiceFailed
from services.cli.fleet import Fleet
from services.cli.restarts import MOST_RESTARTS, PERIOD_S, Restarts
from services.cli.supervisor import Supervisor
from services.cli.up import gpu_options
from services.kvtransfer.config import KvTransferConfig
from services.rpc.config import read_config
from tests.cli.conftest import Run, start_up

pytestmark = pytest.mark.slow
FAKES = "tests.cli.fakes"


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
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


def test_what_is_added_to_a_command_line_wins() -> None:
    with Fleet(package=FAKES, grace_s=3.0) as fleet:
        plain, changed = fleet.start_kvtransfer(), fleet.start_kvtransfer("other", extra=["--grace-s", "1.5"])
        for process, expected in ((plain, 3.0), (changed, 1.5)):
            options = process.command[process.command.index(f"{FAKES}.kvtransfer") + 1 :]
            assert read_config(KvTransferConfig, options, "kvtransfer", {}).grace_s == expected


def test_fleet_starts_connects_and_stops_everything() -> None:
    with Fleet(package=FAKES) as fleet:
        kvtransfer = fleet.start_kvtransfer()
        engine = fleet.start_engine("engine-0", "m", kvtransfer, threads=3, page_count=7)
        router = fleet.start_router([engine], "disaggregated")
        asyncio.run(wait_serving(router.address, 120))
        command = " ".join(engine.command)
        assert f"--kvtransfer {kvtransfer.address}" in command
        assert "--pages 7" in command
        assert f"--engine {engine.address}" in " ".join(router.command)
        assert "threads=3 OMP_NUM_THREADS=3" in engine.log_tail()
        assert router.metrics is not None
        processes, folder = list(fleet.processes), fleet.folder
        assert folder.exists()
    assert not folder.exists()
    assert [process.poll() for process in processes] == [0, 0, 0]


def test_service_that_cannot_start_says_why() -> None:
    with Fleet(package=FAKES) as fleet:
        with pytest.raises(ServiceFailed, match="there is no model missing") as caught:
            fleet.start_engine("engine-0", "missing", None).wait_ready()
        assert caught.value.log_tail == ""
        with pytest.raises(ServiceFailed, match="engine-1 ended with exit code 1") as caught:
            fleet.start_engine("engine-1", "bug", None).wait_ready()
        assert "a bug while loading" in caught.value.log_tail


def test_killed_and_paused_processes() -> None:
    with Fleet(package=FAKES) as fleet:
        first, second = fleet.start_kvtransfer("first"), fleet.start_kvtransfer("second")
        for process in (first, second):
            process.wait_ready()
        first.kill()
        assert first.wait(20) == -signal.SIGKILL
        second.pause()
        with pytest.raises(TimeoutError):
            second.wait(0)
        second.resume()
        second.terminate()
        assert second.wait(20) == 0


def test_a_process_that_ends_while_it_is_told_to_is_not_reaped_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fleet's own threads wait for the end, too, and what is reaped has no group that could be signalled."""
    kill_group = os.killpg

    def kill_too_late(group: int, number: int) -> None:
        os.kill(group, signal.SIGKILL)
        reaper = Thread(target=process.wait)
        reaper.start()
        reaper.join(0.2)  # a moment in which it could go wrong
        kill_group(group, number)

    with Fleet(package=FAKES) as fleet:
        process = fleet.start_kvtransfer()
        process.wait_ready()
        with monkeypatch.context() as patched:
            patched.setattr(os, "killpg", kill_too_late)
            process.terminate()
        assert process.wait(60) == -signal.SIGKILL


def test_stop_kills_what_does_not_end() -> None:
    with Fleet(package=FAKES) as fleet:
        stuck = fleet.start_kvtransfer()
        stuck.wait_ready()
        stuck.pause()
        fleet.stop(timeout_s=0.1)
        assert stuck.poll() == -signal.SIGKILL


def read_event(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The next line of `up --json`."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise AssertionError(process.communicate()[1])
    event: dict[str, Any] = json.loads(line)
    return event


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


def test_up_killed_leaves_no_process(tmp_path: Path) -> None:
    with start_up(tmp_path, "m") as launcher:
        ready = read_event(launcher)
        launcher.kill()
        wait_dead([endpoint["pid"] for endpoint in ready["endpoints"]])


def test_second_signal_does_not_wait_for_a_stuck_child(tmp_path: Path) -> None:
    with start_up(tmp_path, "m") as launcher:
        pids = [endpoint["pid"] for endpoint in read_event(launcher)["endpoints"]]
        read_event(launcher)
        os.kill(pids[-1], signal.SIGSTOP)
        launcher.send_signal(signal.SIGINT)
        assert read_event(launcher) == {"event": "stopping"}
        launcher.send_signal(signal.SIGINT)
        launcher.communicate(timeout=8)  # less than a stuck child is given
        assert launcher.returncode == 0
        assert not any(alive(pid) for pid in pids)


@pytest.mark.parametrize("name", ["kvtransfer", "engine-1", "router"])
def test_up_starts_a_service_again_where_it_was(tmp_path: Path, microserve: Run, name: str) -> None:
    with start_up(tmp_path, "m") as launcher:
        before = {endpoint["name"]: endpoint for endpoint in read_event(launcher)["endpoints"]}
        read_event(launcher)
        os.kill(before[name]["pid"], signal.SIGKILL)
        assert read_event(launcher) == {"event": "restarting", "name": name}
        ready = read_event(launcher)
        after = {endpoint["name"]: endpoint for endpoint in ready["endpoints"]}
        assert list(after) == list(before)
        assert [each for each in after if after[each]["pid"] != before[each]["pid"]] == [name]
        assert [each["grpc"] for each in after.values()] == [each["grpc"] for each in before.values()]
        assert microserve("ask", "Hi", "--address", after["router"]["grpc"])[0] == 0
        launcher.send_signal(signal.SIGTERM)
        assert read_event(launcher) == {"event": "stopping"}
        launcher.communicate(timeout=60)
        assert launcher.returncode == 0
        assert not any(alive(endpoint["pid"]) for endpoint in (*before.values(), *after.values()))


def test_up_ends_when_a_child_dies_again_and_again(tmp_path: Path) -> None:
    with start_up(tmp_path, "m") as launcher:
        event = read_event(launcher)
        read_event(launcher)
        for number in range(MOST_RESTARTS + 1):
            pids = {endpoint["name"]: endpoint["pid"] for endpoint in event["endpoints"]}
            os.kill(pids["engine-1"], signal.SIGKILL)
            if number < MOST_RESTARTS:
                assert read_event(launcher) == {"event": "restarting", "name": "engine-1"}
                event = read_event(launcher)
        _, err = launcher.communicate(timeout=60)
        assert launcher.returncode == 1
        assert err.startswith("microserve: engine-1 ended by signal 9\n")
        assert not any(alive(pid) for pid in pids.values())


@contextmanager
def up_with_model(folder: Path) -> Iterator[tuple[subprocess.Popen[str], Path, dict[str, dict[str, Any]]]]:
    """`up` that serves, the folder where engines find what to do at their next start, and the endpoints by name."""
    logs, model = folder / "logs", folder / "model"
    logs.mkdir()
    model.mkdir()
    with start_up(logs, str(model)) as launcher:
        try:
            yield launcher, model, endpoints_of(read_event(launcher))
        finally:
            launcher.kill()  # its lifeline takes the rest


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


def test_up_says_ready_once_all_that_died_are_ready_again(tmp_path: Path) -> None:
    with up_with_model(tmp_path) as (launcher, model, before):
        read_event(launcher)
        pipe = model / "engine-1.before_ready"
        os.mkfifo(pipe)
        kill_and_hear(launcher, before, "engine-1")
        with pipe.open("w") as waiting:
            kill_and_hear(launcher, before, "engine-0")
            waiting.write("go on")
        after = endpoints_of(read_event(launcher))
        assert [name for name in after if after[name]["pid"] != before[name]["pid"]] == ["engine-0", "engine-1"]
        stop_and_hear(launcher)


def test_up_hears_a_signal_while_one_of_two_is_slow_to_come_back(tmp_path: Path) -> None:
    with up_with_model(tmp_path) as (launcher, model, before):
        read_event(launcher)
        pipe = model / "engine-1.before_ready"
        os.mkfifo(pipe)
        kill_and_hear(launcher, before, "engine-1")
        with pipe.open("w"):  # from here on it waits
            kill_and_hear(launcher, before, "engine-0")
            asyncio.run(wait_serving(before["engine-0"]["grpc"], 120))
            stop_and_hear(launcher)


def test_up_says_ready_when_what_died_serves(tmp_path: Path) -> None:
    with up_with_model(tmp_path) as (launcher, model, before):
        read_event(launcher)
        pipe = model / "engine-1.before_serving"
        os.mkfifo(pipe)
        kill_and_hear(launcher, before, "engine-1")
        with pipe.open("w") as ready_and_waiting:
            kill_and_hear(launcher, before, "engine-0")
            ready_and_waiting.write("go on")
        assert endpoints_of(read_event(launcher)).keys() == before.keys()
        stop_and_hear(launcher)


def test_a_child_of_what_died_ends_with_it(tmp_path: Path) -> None:
    logs, model = tmp_path / "logs", tmp_path / "model"
    logs.mkdir()
    model.mkdir()
    forks = model / "engine-1.forks"
    forks.touch()
    with start_up(logs, str(model)) as launcher:
        before = endpoints_of(read_event(launcher))
        read_event(launcher)
        child = int(forks.read_text())
        kill_and_hear(launcher, before, "engine-1")
        endpoints_of(read_event(launcher))
        wait_dead([child])
        stop_and_hear(launcher)
        wait_dead([int(forks.read_text())])


def test_a_process_that_left_the_group_does_not_keep_the_launcher(tmp_path: Path) -> None:
    """It holds the pipe still when all that may be killed is dead."""
    words = "import subprocess, sys; child = subprocess.Popen(['sleep', 'infinity'], start_new_session=True)\n"
    words += "print(child.pid, file=sys.stderr)"
    with Fleet(tmp_path, within=(sys.executable, "-c", words)) as fleet:
        process = fleet.start_kvtransfer()
        assert process.wait(60) == 0
        stranger = int(process.log_tail().splitlines()[0])
    os.kill(stranger, signal.SIGKILL)


def test_up_says_that_it_cannot_start_a_service_again(tmp_path: Path) -> None:
    with up_with_model(tmp_path) as (launcher, _, before):
        read_event(launcher)
        shutil.rmtree(tmp_path / "logs")
        kill_and_hear(launcher, before, "engine-1")
        assert read_event(launcher) == {"event": "stopping"}
        _, err = launcher.communicate(timeout=60)
        assert launcher.returncode == 1
        assert err.startswith("microserve: engine-1 could not be started again: ")
        assert err.count("\n") == 1


def test_up_starts_again_what_failed_to_start_again(tmp_path: Path) -> None:
    with up_with_model(tmp_path) as (launcher, model, before):
        read_event(launcher)
        (model / "engine-1.fails").touch()
        kill_and_hear(launcher, before, "engine-1")
        assert read_event(launcher) == {"event": "restarting", "name": "engine-1"}
        after = endpoints_of(read_event(launcher))
        assert [each["grpc"] for each in after.values()] == [each["grpc"] for each in before.values()]
        stop_and_hear(launcher)


async def test_what_is_not_ready_in_time_has_died(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restarts, "PERIOD_S", 3600.0)
    deaths: list[int] = []
    said: list[str] = []
    with Fleet(package=FAKES) as fleet:
        supervisor = Supervisor(
            fleet, lambda process: deaths.append(process.wait(0)), lambda: said.append("ready"), start_timeout_s=0.1
        )
        process = supervisor.watch(fleet.start_engine("engine-0", tmp_path, None))
        await asyncio.wrap_future(process.ready)
        os.mkfifo(tmp_path / "engine-0.before_ready")
        supervisor.restarting = True
        process.kill()
        error = await asyncio.wait_for(supervisor.failed, 120)
        await supervisor.close()
    assert str(error) == "engine-0 ended by signal 9"
    assert deaths == [-signal.SIGKILL] * MOST_RESTARTS
    assert said == []


def test_restarts_are_forgotten_after_a_while() -> None:
    now = 0.0
    restarts = Restarts(lambda: now)
    for _ in range(MOST_RESTARTS):
        assert restarts.allow("engine-0")
        now += PERIOD_S / 10
    assert not restarts.allow("engine-0")
    assert restarts.allow("engine-1")
    now = PERIOD_S
    assert restarts.allow("engine-0")
    assert not restarts.allow("engine-0")


def test_up_starts_a_router_again_that_a_program_has_stuck(tmp_path: Path, microserve: Run) -> None:
    with start_up(tmp_path, "m") as launcher:
        endpoints = {endpoint["name"]: endpoint for endpoint in read_event(launcher)["endpoints"]}
        read_event(launcher)
        address = ("--address", endpoints["router"]["grpc"])
        assert microserve("ask", "stuck", *address)[0] != 0
        assert read_event(launcher) == {"event": "restarting", "name": "router"}
        assert read_event(launcher)["event"] == "ready"
        assert microserve("ask", "Hi", *address)[0] == 0
        launcher.send_signal(signal.SIGTERM)
        launcher.communicate(timeout=60)
        assert launcher.returncode == 0


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
