"""The largest columns of a product, as kernels of a team: each chunk is looked through while caches still have it."""

from __future__ import annotations

from typing import Any

from services.engine.kernels.largest import find_largest, is_larger
from services.engine.kernels.machine_code import kernel
from services.engine.kernels.memory import call_kernel, floats, int64s


def _multiply_and_find(job: Any, chunk: int) -> None:
    """A chunk of the product whose kernel and job are named, then the largest of its columns of each row."""
    out, best, places, num_rows = job[2], job[3], job[4], job[5]
    row_columns, num_columns, columns_a_chunk = job[6], job[7], job[8]
    call_kernel(job[0], job[1], chunk)
    first = chunk * columns_a_chunk
    count = min(columns_a_chunk, num_columns - first)
    values = floats(best + chunk * num_rows * 4, (num_rows,))
    columns = int64s(places + chunk * num_rows * 8, (num_rows,))
    for row in range(num_rows):
        value, place = find_largest(out + (row * row_columns + first) * 4, count)
        values[row], columns[row] = value, first + place


def _choose(job: Any, chunk: int) -> None:
    """Of each row the first of the largest that chunks have found."""
    num_chunks, num_rows = job[3], job[4]
    best, places = floats(job[0], (num_chunks, num_rows)), int64s(job[1], (num_chunks, num_rows))
    chosen = int64s(job[2], (num_rows,))
    for row in range(num_rows):
        found = 0
        for number in range(1, num_chunks):
            if is_larger(best[number, row], best[found, row]):
                found = number
        chosen[row] = places[found, row]


multiply_and_find = kernel(_multiply_and_find, fast=False)  # NaN is compared
choose = kernel(_choose, fast=False)
