"""Both ways of copying pages move exactly what the runs say."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from services.kvtransfer import streaming
from services.kvtransfer.streaming import CopyPages, copy_plainly, page_copier

NUM_PAGES = 12


def memory(page_bytes: int, *, offset: int = 0) -> NDArray[np.uint8]:
    """Pages that begin `offset` bytes behind a line of the caches."""
    whole = np.zeros(NUM_PAGES * page_bytes + 128, np.uint8)
    begin = -whole.ctypes.data % 64 + offset
    return whole[begin : begin + NUM_PAGES * page_bytes].reshape(NUM_PAGES, page_bytes)


@pytest.mark.parametrize("copy_pages", [copy_plainly, page_copier()])
@settings(max_examples=25, deadline=None)
@given(
    page_bytes=st.sampled_from([256, 1024, 24576, 64, 320]),
    offset=st.sampled_from([0, 64, 8]),
    runs=st.lists(st.tuples(st.integers(0, 8), st.integers(1, 3)), max_size=4),
    targets=st.permutations([0, 3, 6, 9]),
)
def test_what_the_runs_say(
    copy_pages: CopyPages, page_bytes: int, offset: int, runs: list[tuple[int, int]], targets: list[int]
) -> None:
    source, target = memory(page_bytes), memory(page_bytes, offset=offset)
    source[:] = np.random.default_rng(0).integers(1, 256, source.shape)
    wanted = target.copy()
    rows = [(from_page, to_page, count) for (from_page, count), to_page in zip(runs, targets, strict=False)]
    for from_page, to_page, count in rows:
        wanted[to_page : to_page + count] = source[from_page : from_page + count]
    copy_pages(source, target, np.array(rows, np.int64).reshape(-1, 3))
    np.testing.assert_array_equal(target, wanted)


def test_machine_code_is_used_here() -> None:
    """llvmlite is installed wherever these tests run: otherwise both arms above would be the same."""
    assert page_copier() is not copy_plainly


def test_without_llvmlite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llvmlite.binding", None)
    assert streaming.page_copier.__wrapped__() is copy_plainly
