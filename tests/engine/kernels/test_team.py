"""A team computes every chunk of a job exactly once, however many threads take part."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from services.engine.kernels.machine_code import kernel
from services.engine.kernels.memory import int64s
from services.engine.kernels.team import Team, addresses, team_of


def _count(job: Any, chunk: int) -> None:
    counts = int64s(job[0], (job[1],))
    counts[chunk] += job[2]


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


def test_a_process_has_one_team_of_a_size() -> None:
    assert team_of(3) is team_of(3) is not team_of(2)
