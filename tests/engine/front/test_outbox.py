"""What the loop thread says reaches the event loop: all of it, in order, with few wake-ups."""

from __future__ import annotations

import asyncio
import sys
import threading
import time

import pytest

from services.engine.front import outbox
from services.engine.front.outbox import Outbox


async def test_calls_that_wait_together_cost_one_wake_up(monkeypatch: pytest.MonkeyPatch) -> None:
    made, ran = Outbox(), []
    wake_ups: list[object] = []
    ring = outbox._ring
    monkeypatch.setattr(outbox, "_ring", lambda *arguments: (wake_ups.append(arguments), ring(*arguments)))
    for number in range(4):
        made.post(lambda number=number: ran.append(number))  # type: ignore[misc]
    assert ran == []
    await _handed_on(made)
    assert ran == [0, 1, 2, 3]
    assert len(wake_ups) == 1
    made.post(lambda: ran.append(4))
    await _handed_on(made)
    assert ran[-1] == 4
    assert len(wake_ups) == 2


async def test_who_posts_goes_on_before_the_event_loop_does() -> None:
    """It keeps the GIL: a step that is to be begun does not wait until all streams have been served."""
    made, ran, over = Outbox(), [], asyncio.Event()
    seen: list[int] = []

    def say() -> None:
        for number in range(50):
            done = threading.Event()
            made.post(lambda number=number, done=done: (ran.append(number), done.set()))  # type: ignore[misc]
            until = time.perf_counter() + 0.001
            while time.perf_counter() < until:  # the event loop wakes up meanwhile
                pass
            seen.append(len(ran))
            done.wait(30)
        made.post(over.set)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(30)
    try:
        thread = threading.Thread(target=say)
        thread.start()
        async with asyncio.timeout(30):
            await over.wait()
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert seen == list(range(50))


async def test_nothing_of_another_thread_is_lost_or_reordered() -> None:
    made, ran, all_ran = Outbox(), [], asyncio.Event()

    def say() -> None:
        for number in range(10_000):
            made.post(lambda number=number: ran.append(number))  # type: ignore[misc]
        made.post(all_ran.set)

    thread = threading.Thread(target=say)
    thread.start()
    async with asyncio.timeout(30):
        await all_ran.wait()
    thread.join()
    assert ran == list(range(10_000))


async def test_a_call_that_fails_takes_no_other_with_it(caplog: pytest.LogCaptureFixture) -> None:
    made, ran = Outbox(), []
    made.post(lambda: ran.append(1 // 0))
    made.post(lambda: ran.append(1))
    await _handed_on(made)
    assert ran == [1]
    assert "ZeroDivisionError" in caplog.text


def test_a_loop_that_is_closed_is_left_alone() -> None:
    loop, ran = asyncio.new_event_loop(), []

    async def make() -> Outbox:
        return Outbox()

    made = loop.run_until_complete(make())
    loop.close()
    made.post(lambda: ran.append(1))
    assert ran == []


async def _handed_on(made: Outbox) -> None:
    """Returns when all that was posted has run."""
    over = asyncio.Event()
    made.post(over.set)
    async with asyncio.timeout(30):
        await over.wait()
