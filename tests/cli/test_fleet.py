"""Child processes: command lines, readiness, death, and that nothing outlives the fleet."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from threading import Thread

import pytest

from services.cli.client import wait_serving
from services.cli.errors import ServiceFailed
from services.cli.fleet import Fleet
from services.kvtransfer.config import KvTransferConfig
from services.rpc.config import read_config

pytestmark = pytest.mark.slow
FAKES = "tests.cli.fakes"


def test_what_is_added_to_a_command_line_wins() -> None:
    with Fleet(package=FAKES, grace_s=3.0) as fleet:
        plain, changed = fleet.start_kvtransfer(), fleet.start_kvtransfer("other", extra=["--grace-s", "1.5"])
        for process, expected in ((plain, 3.0), (changed, 1.5)):
            options = process.command[process.command.index(f"{FAKES}.kvtransfer") + 1 :]
            assert read_config(KvTransferConfig, options, "kvtransfer", {}).grace_s == expected


def test_fleet_starts_connects_and_stops_everything() -> None:
    with Fleet(package=FAKES) as fleet:
        kvtransfer = fleet.start_kvtransfer()
        engine = fleet.start_engine("engine-0", "m", kvtransfer, threads=3, extra=["--pages", "7"])
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


def test_a_process_that_left_the_group_does_not_keep_the_launcher(tmp_path: Path) -> None:
    """It holds the pipe still when all that may be killed is dead."""
    words = "import subprocess, sys; child = subprocess.Popen(['sleep', 'infinity'], start_new_session=True)\n"
    words += "print(child.pid, file=sys.stderr)"
    with Fleet(tmp_path, within=(sys.executable, "-c", words)) as fleet:
        process = fleet.start_kvtransfer()
        assert process.wait(60) == 0
        stranger = int(process.log_tail().splitlines()[0])
    os.kill(stranger, signal.SIGKILL)
