"""Whose turn is next, whatever was expected of answers and whatever they had."""

from __future__ import annotations

import itertools
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from services.router.admission.account import MOST_CREDIT, Charge
from services.router.admission.queues import Queues
from services.router.admission.ticket import Priority

HIGH, NORMAL, LOW = Priority
_COST = st.integers(1, 4000)


@settings(deadline=None)
@given(
    st.lists(st.tuples(_COST, _COST), min_size=1, max_size=40),
    st.lists(_COST, min_size=1, max_size=60),
)
def test_no_refund_lets_low_pass_high(alone: list[tuple[int, int]], together: list[int]) -> None:
    """LOW is alone at first, and its answers end when HIGH waits too: then it gets twice its share at most."""
    queues: Queues[tuple[Priority, int]] = Queues()
    running: list[tuple[tuple[Charge, Charge], int]] = []
    numbers = itertools.count()
    for expected, cost in alone:
        queues.push(LOW, "t", expected, (LOW, next(numbers)))
        queues.push(LOW, "t", 1, (LOW, next(numbers)))  # so that somebody waits throughout
        running.append((queues.pop()[1], cost))
    for cost in together:
        for priority in (HIGH, LOW):
            queues.push(priority, "t", cost, (priority, next(numbers)))
    had, largest = Counter[Priority](), 4000
    while queues.num_of(HIGH):
        if running:
            charges, cost = running.pop()
            for charge in charges:
                charge.settle(cost)
        (priority, _), charges = queues.pop()
        had[priority] += charges[0].expected
        assert had[LOW] <= 2 * (had[HIGH] / 16 + largest)
        assert had[LOW] <= had[HIGH] / 16 + largest + MOST_CREDIT


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abcd"), _COST, _COST, st.integers(0, 3)), max_size=60),
    st.lists(_COST, max_size=10),
)
def test_who_comes_anew_waits_for_one_turn_of_each_other_and_tenants_have_theirs_in_order(
    history: list[tuple[str, int, int, int]], ends: list[int]
) -> None:
    queues: Queues[tuple[str, int]] = Queues()
    running: list[tuple[Charge, Charge]] = []
    seen: dict[str, int] = {}

    def pop() -> str:
        (tenant, number), charges = queues.pop()
        assert seen.get(tenant, -1) < number
        seen[tenant] = number
        running.append(charges)
        return tenant

    for number, (tenant, expected, cost, num_popped) in enumerate(history):
        queues.push(NORMAL, tenant, expected, (tenant, number))
        for _ in range(min(num_popped, len(queues))):
            pop()
        if cost % 2 and running:
            for charge in running.pop(0):
                charge.settle(cost)
    queues.push(NORMAL, "new", 100, ("new", len(history)))
    before: Counter[str] = Counter()
    while (tenant := pop()) != "new":
        before[tenant] += 1
        if ends:
            cost = ends.pop()
            for charge in running.pop(0):
                charge.settle(cost)
    assert max(before.values(), default=0) <= 1


def test_all_is_forgotten_when_nobody_waits() -> None:
    queues: Queues[str] = Queues()
    queues.push(HIGH, "long", 100, "first")
    _, charges = queues.pop()
    for priority, name in ((NORMAL, "short"), (HIGH, "long")):
        queues.push(priority, name, 100, name)
    for charge in charges:
        charge.settle(10**6)
    assert [queues.pop()[0] for _ in range(2)] == ["long", "short"]


def test_tenants_that_are_gone_are_forgotten_while_others_wait() -> None:
    queues: Queues[int] = Queues()
    queues.push(NORMAL, "patient", 10**9, -1)
    queues.push(NORMAL, "patient", 10**9, -2)
    for number in range(5000):
        queues.push(NORMAL, f"tenant {number}", 1, number)
        queues.discard(NORMAL, number) if number % 2 else queues.pop()
    [of_normal] = [queue for priority, queue in queues._queues.items() if priority is NORMAL]
    assert len(of_normal._idle) <= 1024
    assert len(of_normal._waiting) <= 3
    assert len(of_normal._flows) == len(queues)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(list(Priority)), st.sampled_from("ab"), _COST, st.booleans()), max_size=40),
    st.sampled_from(list(Priority)),
    st.sampled_from("abc"),
)
def test_what_is_done_before_a_new_request_is_known_but_for_one_turn_of_each_other_class(
    history: list[tuple[Priority, str, int, bool]], priority: Priority, tenant: str
) -> None:
    queues: Queues[tuple[Priority, int]] = Queues()
    for number, (its_priority, its_tenant, cost, is_popped) in enumerate(history):
        queues.push(its_priority, its_tenant, cost, (its_priority, number))
        if is_popped:
            queues.pop()
    expected = queues.work_before(priority, tenant)
    new = (priority, len(history))
    queues.push(priority, tenant, 1, new)
    done, largest = 0.0, Counter[Priority]()
    while True:
        item, (charge, _) = queues.pop()
        if item == new:
            break
        done += charge.expected
        largest[item[0]] = max(largest[item[0]], int(charge.expected))
    del largest[priority]
    assert expected <= done * (1 + 1e-9) + 1e-9
    assert done <= expected + largest.total() + 1e-9
