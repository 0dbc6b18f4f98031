"""What is known of tenants' answers."""

from __future__ import annotations

import pytest

from services.router.admission.habits import Habits


def test_a_tenant_is_expected_to_go_on_as_before_and_a_new_one_to_be_as_all() -> None:
    habits = Habits()
    assert habits.ratio("anybody") == 1
    for _ in range(100):
        habits.add("long", 50, 2000)
        habits.add("cautious", 4000, 40)
    assert habits.ratio("long") == pytest.approx(40, rel=0.01)
    assert habits.ratio("cautious") == pytest.approx(0.01, rel=0.01)
    assert 0.01 < habits.ratio("new") < 40
    for _ in range(40):
        habits.add("cautious", 4000, 4000)
    assert habits.ratio("cautious") == pytest.approx(1, rel=0.01)


def test_long_answers_are_not_forgotten_over_many_short_ones_that_were_expected() -> None:
    habits = Habits()
    for _ in range(100):
        habits.add("mixed", 256, 4000)
        for _ in range(9):
            habits.add("mixed", 1, 1)
    assert habits.ratio("mixed") > 10


def test_tenants_that_are_gone_are_forgotten() -> None:
    habits = Habits()
    for number in range(5000):
        habits.add(f"tenant {number}", 100, 100)
        habits.add("always there", 100, 300)
    assert len(habits) <= 1024
    assert habits.ratio("always there") == pytest.approx(3, rel=0.01)
