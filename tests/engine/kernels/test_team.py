"""A team computes every chunk of a job exactly once, however many threads take part."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest

from services.engine.kernels.machine_code import kernel
from services.engine.kernels.memory import atomic_add, atomic_load, int64s
from services.engine.kernels.team import _ASLEEP, Team, addresses, team_of


def _count(job: Any, chunk: int) -> None:
    counts = int64s(job[0], (job[1],))
    counts[chunk] += job[2]


def _meet(job: Any, chunk: int) -> None:
    """Counts itself in job[0], waits a while for a second one, and says in job[1] that it is done."""
    atomic_add(job[0], 1)
    for _ in range(job[2]):
        if atomic_load(job[0]) >= 2:
            break
    atomic_add(job[1], 1 if atomic_load(job[0]) >= 2 else 1_000)


@pytest.fixture(scope="module")
def count() -> int:
    return kernel(_count)


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_every_chunk_is_computed_once(count: int, num_threads: int) -> None:
    team = team_of(num_threads)
    for num_chunks in [1, 2, 3, 64, 1000] * 40:
        counts = np.zeros(num_chunks, dtype=np.int64)
        team.run(count, addresses(counts, num_chunks, 7), num_chunks)
        assert (counts == 7).all()


def test_two_callers_of_one_team(count: int) -> None:
    team, wrong = Team(2), []

    def work() -> None:
        for _ in range(500):
            counts = np.zeros(50, dtype=np.int64)
            team.run(count, addresses(counts, 50, 3), 50)
            if not (counts == 3).all():
                wrong.append(counts)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert not any(thread.is_alive() for thread in threads)


def test_a_helper_that_sleeps_wakes_while_another_thread_has_the_gil() -> None:
    team, meet = Team(2), kernel(_meet)
    words = np.zeros(16, dtype=np.int64)  # chunks begun, and on another cache line chunks done
    may_begin = threading.Semaphore(0)

    def keep_the_gil() -> None:
        may_begin.acquire()
        until = time.monotonic() + 30
        while words[8] == 0 and time.monotonic() < until:
            pass

    interval = sys.getswitchinterval()
    other = threading.Thread(target=keep_the_gil)
    other.start()
    asleep = ctypes.c_int64.from_address(team._board + _ASLEEP)
    until = time.monotonic() + 30
    while not asleep.value and time.monotonic() < until:
        time.sleep(0.001)
    sys.setswitchinterval(30)
    try:
        may_begin.release()
        until = time.monotonic() + 0.005
        while time.monotonic() < until:  # the other thread wakes up, and gets the GIL when the team computes
            pass
        team.run(meet, addresses(words, words[8:], 5_000_000_000), 2)
    finally:
        sys.setswitchinterval(interval)
    other.join(60)
    assert words[8] == 2


def test_a_process_has_one_team_of_a_size() -> None:
    assert team_of(3) is team_of(3) is not team_of(2)
