"""Jobs are computed in order as often as asked, and memory is used again only when nobody reads it any more."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from services.engine.kernels.jobs import Jobs, Memory, rows_a_chunk
from services.engine.kernels.machine_code import kernel
from services.engine.kernels.memory import floats
from services.engine.kernels.team import team_of


def _double_and_add(job: Any, chunk: int) -> None:
    """target = 2 * source + number, eight floats a chunk."""
    source, target = floats(job[0] + chunk * 32, (8,)), floats(job[1] + chunk * 32, (8,))
    for index in range(8):
        target[index] = source[index] * 2 + job[2]


@pytest.fixture(scope="module")
def double_and_add() -> int:
    return kernel(_double_and_add)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("memory", [None, Memory()])
def test_jobs_run_in_order_again_and_again(double_and_add: int, num_threads: int, memory: Memory | None) -> None:
    jobs, values = Jobs(team_of(num_threads), memory), torch.zeros(4 * 8)
    result = values
    for number in range(6):
        source, result = result, jobs.take(4 * 8)
        jobs.add(double_and_add, 1 if number == 2 else 4, source, result, number)
        if number == 2:
            jobs.add(double_and_add, 4, source, result, number)
        jobs.mark()
    for start in (0.0, 1.0, -3.0):
        values.fill_(start)
        jobs.run()
        expected = start
        for number in range(6):
            expected = expected * 2 + number
        assert (result == expected).all()


def test_marks_are_met_between_jobs(double_and_add: int) -> None:
    jobs, values = Jobs(team_of(2)), torch.ones(16)
    first, second = jobs.take(16), jobs.take(16)
    first.zero_()
    second.zero_()
    jobs.mark()
    jobs.add(double_and_add, 2, values, first, 0)
    jobs.mark()
    jobs.add(double_and_add, 2, first, second, 0)
    seen: list[tuple[int, float, float]] = []
    jobs.run(lambda number: seen.append((number, float(first.sum()), float(second.sum()))))
    assert seen == [(0, 0, 0), (1, 32, 0)]
    assert float(second.sum()) == 64


def test_memory_lasts_until_the_next_but_one_mark() -> None:
    jobs = Jobs(team_of(1), Memory())
    taken = []
    for _ in range(3):
        taken.append((jobs.take(5, 7), jobs.take(3, dtype=torch.int8)))
        jobs.mark()
    assert len({tensor.data_ptr() for pair in taken[:2] for tensor in pair}) == 4
    assert [tensor.data_ptr() for tensor in taken[2]] == [tensor.data_ptr() for tensor in taken[0]]
    assert (taken[0][0].shape, taken[0][1].dtype) == ((5, 7), torch.int8)


def test_memory_that_grows_stays_with_who_has_it() -> None:
    memory = Memory()
    small = Jobs(team_of(1), memory).take(4)
    large = Jobs(team_of(1), memory).take(4096)
    small.fill_(1)
    large.fill_(2)
    assert float(small.sum()) == 4
    assert Jobs(team_of(1), memory).take(2).data_ptr() == large.data_ptr()


def test_rows_are_shared_if_that_is_worth_it() -> None:
    team = team_of(2)
    assert rows_a_chunk(1, 64, team) == 64
    assert rows_a_chunk(1024, 4096, team) == 128
    assert rows_a_chunk(16, 4096, team) == 2
