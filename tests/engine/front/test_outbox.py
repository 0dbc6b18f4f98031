"""What the loop thread says reaches the event loop: all of it, in order, with few wake-ups."""

from __future__ import annotations

import asyncio
import threading

import pytest

from services.engine.front.outbox import Outbox


async def test_calls_that_wait_together_cost_one_wake_up(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, outbox, ran = asyncio.get_running_loop(), Outbox(), []
    wake_ups: list[object] = []
    wake = loop.call_soon_threadsafe
    monkeypatch.setattr(loop, "call_soon_threadsafe", lambda call: (wake_ups.append(call), wake(call)))
    for number in range(5):
        outbox.post(lambda number=number: ran.append(number))  # type: ignore[misc]
    assert ran == []
    assert len(wake_ups) == 1
    await asyncio.sleep(0)
    assert ran == [0, 1, 2, 3, 4]
    outbox.post(lambda: ran.append(5))
    await asyncio.sleep(0)
    assert ran[-1] == 5
    assert len(wake_ups) == 2


async def test_nothing_of_another_thread_is_lost_or_reordered() -> None:
    outbox, ran, all_ran = Outbox(), [], asyncio.Event()

    def say() -> None:
        for number in range(10_000):
            outbox.post(lambda number=number: ran.append(number))  # type: ignore[misc]
        outbox.post(all_ran.set)

    thread = threading.Thread(target=say)
    thread.start()
    async with asyncio.timeout(30):
        await all_ran.wait()
    thread.join()
    assert ran == list(range(10_000))


async def test_a_call_that_fails_takes_no_other_with_it(caplog: pytest.LogCaptureFixture) -> None:
    outbox, ran = Outbox(), []
    outbox.post(lambda: ran.append(1 // 0))
    outbox.post(lambda: ran.append(1))
    await asyncio.sleep(0)
    assert ran == [1]
    assert "ZeroDivisionError" in caplog.text


def test_a_loop_that_is_closed_is_left_alone() -> None:
    loop, ran = asyncio.new_event_loop(), []

    async def make() -> Outbox:
        return Outbox()

    outbox = loop.run_until_complete(make())
    loop.close()
    outbox.post(lambda: ran.append(1))
    assert ran == []
