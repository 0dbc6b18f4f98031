"""Speed while there is something to do."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.router.admission.meter import Meter


def shown(seen: list[tuple[float, float]], *, is_asked: bool) -> float | None:
    """The rate after these passed times and amounts done, asked in between too or not."""
    now = 0.0
    meter = Meter(lambda: now)
    meter.set_busy(True)
    for passed_s, amount in seen:
        now += passed_s
        if is_asked:
            meter.rate()
            meter.set_busy(True)
        if amount:
            meter.add(amount)
    return meter.rate()


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0.1, 60), st.integers(0, 1000)), min_size=1, max_size=20))
def test_how_often_one_looks_changes_nothing(seen: list[tuple[float, float]]) -> None:
    assert shown(seen, is_asked=True) == pytest.approx(shown(seen, is_asked=False))


def test_time_with_nothing_to_do_does_not_count() -> None:
    now = 0.0
    meter = Meter(lambda: now)
    assert meter.rate() is None
    for _ in range(10):
        meter.set_busy(True)
        now += 1
        meter.add(100)
        meter.set_busy(False)
        now += 1000
    assert meter.rate() == pytest.approx(100, rel=0.1)


def test_what_was_long_ago_counts_little() -> None:
    now = 0.0
    meter = Meter(lambda: now)
    meter.set_busy(True)
    for per_second in (1000, 10):
        for _ in range(60):
            now += 1
            meter.add(per_second)
    assert meter.rate() == pytest.approx(10, rel=0.2)
