"""Services of `microserve up` that die, and come back."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from pathlib import Path

import pytest

from services.cli import restarts, supervisor
from services.cli.client import wait_serving
from services.cli.errors import CliError
from services.cli.fleet import Fleet
from services.cli.process import ServiceProcess
from services.cli.restarts import MOST_RESTARTS, PERIOD_S, Restarts, start_limit_s
from services.cli.supervisor import Supervisor
from tests.cli.conftest import Run
from tests.cli.launched import (
    alive,
    endpoints_of,
    kill_and_hear,
    read_event,
    start_up,
    stop_and_hear,
    up_with_model,
    wait_dead,
)

pytestmark = pytest.mark.slow
FAKES = "tests.cli.fakes"


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


@pytest.mark.parametrize("stage", ["before_ready", "before_serving"])
def test_up_says_ready_once_all_that_died_serve_again(tmp_path: Path, stage: str) -> None:
    with up_with_model(tmp_path) as (launcher, model, before):
        read_event(launcher)
        pipe = model / f"engine-1.{stage}"
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


class Heard:
    """What a supervisor of `fleet` says."""

    def __init__(self, fleet: Fleet) -> None:
        self.deaths: list[int] = []
        self.is_ready, self.is_slow = asyncio.Event(), asyncio.Event()
        self.supervisor = Supervisor(fleet, self._died, self.is_ready.set, self._slow, longest_start_s=600.0)

    def _died(self, process: ServiceProcess) -> None:
        self.deaths.append(process.wait(0))

    def _slow(self, process: ServiceProcess) -> None:
        assert process.name == "engine-0"
        self.is_slow.set()


async def test_what_hangs_before_it_is_ready_has_died_and_ends_up_however_long_that_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restarts, "_SHORTEST_START_S", 0.1)
    monkeypatch.setattr(restarts, "_TIMES_FIRST_START", 0.0)
    monkeypatch.setattr(restarts, "PERIOD_S", 0.0)
    with Fleet(package=FAKES) as fleet:
        heard = Heard(fleet)
        process = heard.supervisor.watch(fleet.start_engine("engine-0", tmp_path, None))
        await asyncio.wrap_future(process.ready)
        os.mkfifo(tmp_path / "engine-0.before_ready")
        heard.supervisor.restarting = True
        process.kill()
        error = await asyncio.wait_for(heard.supervisor.failed, 120)
        await heard.supervisor.close()
    assert str(error) == "engine-0 ended by signal 9"
    assert heard.deaths == [-signal.SIGKILL] * MOST_RESTARTS
    assert not heard.is_ready.is_set()


async def test_all_are_announced_however_late_they_serve_and_who_is_late_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "_SLOW_S", 0.1)
    pipe = tmp_path / "engine-0.before_serving"
    with Fleet(package=FAKES) as fleet:
        heard = Heard(fleet)
        process = heard.supervisor.watch(fleet.start_engine("engine-0", tmp_path, None))
        await asyncio.wrap_future(process.ready)
        os.mkfifo(pipe)
        heard.supervisor.restarting = True
        process.kill()
        await asyncio.wait_for(heard.is_slow.wait(), 120)
        assert not heard.is_ready.is_set()
        with pipe.open("w") as waiting:
            waiting.write("go on")
        await asyncio.wait_for(heard.is_ready.wait(), 120)
        await heard.supervisor.close()


async def test_a_look_at_who_serves_that_breaks_off_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[str] = []

    async def look(address: str, timeout_s: float) -> None:
        looks.append(address)
        if len(looks) < 3:
            raise CliError("it broke off")

    monkeypatch.setattr(supervisor, "wait_serving", look)
    monkeypatch.setattr(supervisor, "_PAUSE_S", 0.0)
    with Fleet(package=FAKES) as fleet:
        heard = Heard(fleet)
        process = heard.supervisor.watch(fleet.start_engine("engine-0", tmp_path, None))
        await asyncio.wrap_future(process.ready)
        heard.supervisor.restarting = True
        process.kill()
        await asyncio.wait_for(heard.is_ready.wait(), 120)
        assert looks == [process.address] * 3
        await heard.supervisor.close()


@pytest.mark.parametrize(("first_s", "limit_s"), [(1.0, 60.0), (20.0, 200.0), (90.0, 600.0)])
def test_a_start_has_time_by_what_the_first_one_took(first_s: float, limit_s: float) -> None:
    assert start_limit_s(first_s, 600.0) == limit_s


def test_restarts_are_forgotten_after_a_while() -> None:
    now = 0.0
    restarts = Restarts(lambda: now)
    for _ in range(MOST_RESTARTS):
        assert restarts.allow("engine-0", was_ready=True)
        now += PERIOD_S / 10
    assert not restarts.allow("engine-0", was_ready=True)
    assert restarts.allow("engine-1", was_ready=True)
    now = PERIOD_S
    assert restarts.allow("engine-0", was_ready=True)
    assert not restarts.allow("engine-0", was_ready=True)


def test_starts_that_come_to_nothing_are_counted_apart_and_in_a_row() -> None:
    now = 0.0
    restarts = Restarts(lambda: now)
    for was_ready in (True, True, False, False, True, False, False):
        assert restarts.allow("engine-0", was_ready)
        now += PERIOD_S / 2
    assert not restarts.allow("engine-0", was_ready=False)


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
