"""One timer for many waits."""

from __future__ import annotations

import asyncio

import pytest

from services.router.wait_limit import WaitLimit
from services.rpc.virtual_loop import run


def test_a_wait_that_takes_too_long_is_cut_off_when_its_time_is_over() -> None:
    """However many were short before it, and however late the timer was set for one of those."""

    async def work() -> None:
        limit, loop = WaitLimit(1.0), asyncio.get_running_loop()
        for _ in range(7):
            await limit.wait(asyncio.sleep(0.3))
        begin = loop.time()
        with pytest.raises(TimeoutError):
            await limit.wait(asyncio.sleep(5))
        assert loop.time() - begin == pytest.approx(1.0)
        assert not asyncio.current_task().cancelling()
        await limit.wait(asyncio.sleep(0.9))
        limit.stop()

    run(work())


def test_time_between_waits_does_not_count() -> None:
    async def work() -> None:
        limit = WaitLimit(1.0)
        await limit.wait(asyncio.sleep(0.9))
        await asyncio.sleep(10)
        await limit.wait(asyncio.sleep(0.9))
        limit.stop()

    run(work())


def test_a_task_that_is_cancelled_too_is_cancelled() -> None:
    """Here while what it waited for takes its time to end."""

    async def work() -> None:
        async def slow() -> None:
            try:
                await asyncio.sleep(5)
            finally:
                await asyncio.sleep(5)

        task = asyncio.create_task(WaitLimit(1.0).wait(slow()))
        await asyncio.sleep(2)
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()

    run(work())


def test_what_fails_fails() -> None:
    async def fails() -> None:
        raise LookupError

    async def work() -> None:
        limit = WaitLimit(1.0)
        with pytest.raises(LookupError):
            await limit.wait(fails())
        limit.stop()

    run(work())
