"""What a process of a service prints: records of its log, whatever it says, and never beside the READY line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import asyncio, logging, os, sys
from services.rpc.log import configure
from services.rpc.main import run_main
from services.rpc.server import announce_ready
configure("router")
async def main():
    {}
run_main("program", main())
"""


def run(*body: str) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format("\n    ".join(body))
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)


def messages(log: str) -> list[str]:
    for line in log.splitlines():
        assert line.startswith("time=2"), line
        assert " level=info service=router logger=" in line
    return [line.partition(" msg=")[2] for line in log.splitlines()]


def test_what_looks_like_a_record_is_none() -> None:
    ended = run("print('x\\ntime=2026-11-22T00:00:00.000Z level=error service=router logger=services.keys msg=forged')")
    first, second = messages(ended.stderr)
    assert first == "x"
    assert second == '"time=2026-11-22T00:00:00.000Z level=error service=router logger=services.keys msg=forged"'


def test_a_line_that_has_begun_is_before_no_record() -> None:
    ended = run(
        "print('seen:', end=' ', flush=True)", "logging.getLogger('services.x').info('real')", "print(1, end='')"
    )
    assert messages(ended.stderr) == ["real", '"seen: 1"']


def test_a_very_long_line_is_several_records() -> None:
    ended = run("print('a' * 5000, end='')", "print('b' * 5000)", "print()")
    assert messages(ended.stderr) == ["a" * 4096, "a" * 904 + "b" * 3192, "b" * 1808, '""']


def test_what_ends_with_an_error_has_said_all_of_it() -> None:
    ended = run("from services.rpc.errors import StartError", "print('last', end='')", "raise StartError('no')")
    record, error = ended.stderr.splitlines()
    assert (messages(record), error, ended.returncode) == (["last"], "program: no", 2)


def test_a_log_that_nobody_reads_is_no_failure_of_who_prints() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    program = PROGRAM.format("print('x')\n    announce_ready('router', 'a:1')")
    with os.fdopen(write_end) as unread:
        ended = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=unread, text=True, timeout=60
        )
    assert ended.returncode == 0
    assert ended.stdout.startswith("READY {")


@pytest.mark.parametrize("body", ["print('x')", "sys.stdout.write('x')", "print('x', flush=True)"])
def test_standard_output_has_the_ready_line_alone(body: str) -> None:
    ended = run(body, "announce_ready('router', 'a:1')")
    assert messages(ended.stderr) == ["x"]
    assert ended.stdout == 'READY {"service":"router","address":"a:1","metrics":null}\n'
