"""Speed while there is something to do, on a clock that jumps."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.router.admission.meter import Meter
from services.rpc.virtual_loop import run


async def shown(seen: list[tuple[float, float]], *, is_asked: bool) -> float | None:
    """The rate after these passed times and amounts done, asked in between too or not."""
    meter = Meter(asyncio.get_running_loop().time)
    meter.set_busy(True)
    for passed_s, amount in seen:
        await asyncio.sleep(passed_s)
        if is_asked:
            meter.rate()
            meter.set_busy(True)
        if amount:
            meter.add(amount)
    return meter.rate()


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0.1, 30), st.integers(0, 1000)), min_size=1, max_size=8))
def test_how_often_one_looks_changes_nothing(seen: list[tuple[float, float]]) -> None:
    assert run(shown(seen, is_asked=True)) == pytest.approx(run(shown(seen, is_asked=False)))


def test_time_with_nothing_to_do_does_not_count() -> None:
    async def main() -> None:
        meter = Meter(asyncio.get_running_loop().time)
        assert meter.rate() is None
        for _ in range(10):
            meter.set_busy(True)
            await asyncio.sleep(1)
            meter.add(100)
            meter.set_busy(False)
            await asyncio.sleep(1000)
        assert meter.rate() == pytest.approx(100, rel=0.1)

    run(main())


def test_what_was_long_ago_counts_little() -> None:
    seen = [(1.0, per_second) for per_second in (1000.0, 10.0) for _ in range(60)]
    assert run(shown(seen, is_asked=False)) == pytest.approx(10, rel=0.2)


def test_time_in_which_the_loop_stood_still_does_not_count() -> None:
    async def main(stopped_s: float) -> float | None:
        loop, skipped_s = asyncio.get_running_loop(), 0.0
        meter = Meter(lambda: loop.time() + skipped_s)
        meter.set_busy(True)
        for _ in range(20):
            await asyncio.sleep(0.05)
            meter.add(5)
        skipped_s = stopped_s
        return meter.rate()

    assert run(main(0)) == pytest.approx(100, rel=0.1)
    assert run(main(60)) == pytest.approx(100, rel=0.2)


def test_nobody_looks_at_what_has_nothing_to_do() -> None:
    async def main() -> None:
        meter = Meter(asyncio.get_running_loop().time)
        meter.set_busy(True)
        meter.set_busy(False)
        await asyncio.sleep(1)
        await asyncio.Event().wait()

    with pytest.raises(AssertionError, match="no timer will ever end it"):
        run(main())


@pytest.mark.parametrize(("number", "times"), [(1, 6), (4, 2.75), (100, 1.23), (10_000, 1.02)])
def test_a_few_things_seen_say_little_and_thousands_all(number: int, times: float) -> None:
    async def main() -> None:
        meter = Meter(asyncio.get_running_loop().time)
        meter.set_busy(True)
        meter.add(7)
        await asyncio.sleep(60)
        for _ in range(number):
            meter.add(7)
        rate, fastest = meter.rate(), meter.fastest()
        assert rate is not None
        assert fastest is not None
        assert fastest / rate == pytest.approx(times, rel=0.01)

    run(main())


def test_what_is_seen_in_a_short_time_bounds_nothing() -> None:
    async def main() -> None:
        meter = Meter(asyncio.get_running_loop().time)
        meter.set_busy(True)
        meter.add(100)
        await asyncio.sleep(0.5)
        assert meter.rate() == pytest.approx(200, rel=0.1)
        assert meter.fastest() is None
        await asyncio.sleep(1)
        assert meter.fastest() is not None

    run(main())


def test_how_long_the_first_thing_takes_each_time_bounds_nothing() -> None:
    async def main() -> None:
        meter = Meter(asyncio.get_running_loop().time)
        for _ in range(10):
            meter.set_busy(True)
            await asyncio.sleep(10)
            assert meter.fastest() is None
            meter.add(1)
            meter.set_busy(False)

    run(main())


def test_what_was_seen_hours_ago_is_forgotten() -> None:
    async def main() -> None:
        meter = Meter(asyncio.get_running_loop().time)
        meter.set_busy(True)
        meter.add(5)
        await asyncio.sleep(300)
        # Three things, of which none may be seen.
        assert meter.fastest() == pytest.approx(5 * 3 / 7.2, rel=0.01)
        await asyncio.sleep(7200)
        assert meter.rate() is None
        assert meter.fastest() is None

    run(main())


def test_what_waits_for_ever_is_found_even_while_somebody_looks() -> None:
    async def main() -> None:
        Meter(asyncio.get_running_loop().time).set_busy(True)
        await asyncio.Event().wait()

    with pytest.raises(AssertionError, match="it takes longer than 10 s"):
        run(main(), longest_s=10)
