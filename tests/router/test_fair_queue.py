"""Shares of a fair queue."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.router.admission.fair_queue import FairQueue


def drained(queue: FairQueue[str]) -> list[str]:
    return [queue.pop()[0] for _ in range(len(queue))]


def test_one_flow_is_first_come_first_served() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in "abc":
        queue.push("flow", 5, item)
    assert (len(queue), drained(queue), len(queue)) == (3, ["a", "b", "c"], 0)
    with pytest.raises(IndexError):
        queue.pop()


def test_a_flood_does_not_hold_up_others() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(100):
        queue.push("flood", 10, f"flood {number}")
    item, charge = queue.pop()
    assert (item, charge.expected) == ("flood 0", 10)
    queue.push("other", 10, "other")
    assert "other" in [queue.pop()[0], queue.pop()[0]]


def test_large_items_are_taken_less_often() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(40):
        queue.push("large", 40, f"large {number}")
        queue.push("small", 10, f"small {number}")
    counts = Counter(item.split()[0] for item in drained(queue)[:25])
    assert counts == {"small": 20, "large": 5}


def test_an_idle_flow_saves_nothing_up() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(20):
        queue.push("busy", 1, f"busy {number}")
    for _ in range(10):
        queue.pop()
    for number in range(20):
        queue.push("late", 1, f"late {number}")
    assert Counter(item.split()[0] for item in drained(queue)[:10]) == {"busy": 5, "late": 5}


def test_what_is_discarded_costs_nothing() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(10):
        queue.push("impatient", 100, f"impatient {number}")
    for number in range(10):
        queue.discard(f"impatient {number}")
    queue.discard("unknown")
    queue.push("other", 1, "other")
    assert queue.cost_before("impatient") == 1
    queue.push("impatient", 1, "again")
    assert drained(queue) == ["other", "again"]


def test_flows_that_are_gone_are_forgotten() -> None:
    queue: FairQueue[int] = FairQueue()
    for number in range(10_000):
        queue.push(f"tenant {number}", 1, number)
        queue.pop() if number % 2 else queue.discard(number)
    assert not queue._idle
    assert not queue._waiting
    assert not queue._flows


def test_what_waits_behind_a_discarded_item_does_not_pay_for_it() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.push("impatient", 1000, "large")
    queue.push("impatient", 10, "small")
    for number in range(3):
        queue.push("other", 10, f"other {number}")
    queue.discard("large")
    queue.push("impatient", 10, "last")
    assert drained(queue) == ["small", "other 0", "other 1", "last", "other 2"]


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 50), st.booleans()), max_size=40), st.integers(0, 3))
def test_turns_are_as_if_what_is_discarded_had_never_come(pushed: list[tuple[str, int, bool]], num_taken: int) -> None:
    queue, without = FairQueue[int](), FairQueue[int]()
    for each in (queue, without):
        for number in range(num_taken):
            each.push("c", 20, -1 - number)
        for _ in range(num_taken):
            each.pop()
    for number, (flow, cost, is_kept) in enumerate(pushed):
        queue.push(flow, cost, number)
        if is_kept:
            without.push(flow, cost, number)
    for number, (_, _, is_kept) in enumerate(pushed):
        if not is_kept:
            queue.discard(number)
    assert [queue.pop()[0] for _ in range(len(queue))] == [without.pop()[0] for _ in range(len(without))]


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 50)), min_size=1, max_size=60))
def test_flows_that_wait_get_equal_shares(pushed: list[tuple[str, int]]) -> None:
    """While both wait, what they got differs by no more than two largest items."""
    queue: FairQueue[int] = FairQueue()
    for number, (flow, cost) in enumerate(pushed):
        queue.push(flow, cost, number)
    waiting = Counter(flow for flow, _ in pushed)
    got = dict.fromkeys("ab", 0)
    while waiting["a"] and waiting["b"]:
        number, charge = queue.pop()
        flow = pushed[number][0]
        got[flow] += charge.expected
        waiting[flow] -= 1
        assert abs(got["a"] - got["b"]) <= 2 * 50
