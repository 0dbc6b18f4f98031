"""The heap of a service that has started."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from services.rpc.heap import settle_heap


class Node:
    """Part of a cycle."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    thresholds = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


def test_what_a_start_made_is_not_looked_at_again() -> None:
    node = Node()
    settle_heap()
    assert gc.get_freeze_count() > 10_000
    assert not any(each is node for each in gc.get_objects())


def test_a_start_leaves_no_garbage_behind() -> None:
    gone = weakref.ref(Node())
    settle_heap()
    assert gone() is None


def test_cycles_made_later_are_still_collected() -> None:
    settle_heap()
    gone = weakref.ref(Node())
    gc.collect()
    assert gone() is None


def test_cycles_made_later_are_freed_by_the_thousand() -> None:
    freed: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "stop":
            freed.append(info["collected"])

    settle_heap()
    gc.callbacks.append(note)
    try:
        for _ in range(20_000):
            Node()
    finally:
        gc.callbacks.remove(note)
    assert sum(freed) > 10_000
    assert max(freed) < 3_000
