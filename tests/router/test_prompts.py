"""Prompts that are not computed yet, and those that never are."""

from __future__ import annotations

import asyncio

import pytest

from services.router.admission.prompts import Prompts
from services.rpc.virtual_loop import run


def test_what_is_computed_or_dropped_counts_no_more() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        prompts = Prompts(loop.time, lambda: None, lambda: 1)
        for name in "abc":
            prompts.begin(name, 100)
        await asyncio.sleep(1)
        assert prompts.num_tokens == 300
        assert prompts.computed("b")
        assert not prompts.computed("b")
        assert prompts.drop("a") == 100
        assert prompts.drop("a") == 0
        assert prompts.num_tokens == 100
        assert prompts.rate() == pytest.approx(100, rel=0.1)
        assert prompts.computed("c")
        await asyncio.sleep(1000)  # time with nothing to compute says nothing of the speed
        assert prompts.rate() == pytest.approx(200, rel=0.1)

    run(main())


def test_each_is_forgotten_when_its_own_time_is_over() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        counted: list[tuple[float, int]] = []
        prompts = Prompts(loop.time, lambda: counted.append((loop.time(), prompts.num_tokens)), lambda: 1)
        for number in range(6):  # at 0.0, 0.1 and so on, where sums of floats are not exact
            prompts.begin(number, 1 << number)
            await asyncio.sleep(0.1)
        prompts.computed(0)
        prompts.drop(3)
        await asyncio.sleep(20)
        prompts.begin("late", 1000)
        await asyncio.sleep(100)
        assert [number for _, number in counted] == [1000 + 4 + 16 + 32, 1000 + 16 + 32, 1000 + 32, 1000, 0]
        assert [at for at, _ in counted] == pytest.approx([30.1, 30.2, 30.4, 30.5, 50.6])
        assert not prompts.computed("late")

    run(main())


def test_one_timer_to_forget_and_one_to_look_are_enough_for_all() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        timers: list[float] = []
        call_later = loop.call_later
        loop.call_later = lambda *args: timers.append(args[0]) or call_later(*args)  # type: ignore[method-assign, assignment]
        prompts = Prompts(loop.time, lambda: None, lambda: 1)
        for number in range(1000):
            prompts.begin(number, 10)
            prompts.computed(number)
        assert sorted(timers) == [0.1, 30]

    run(main())
