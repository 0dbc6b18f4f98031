"""Tasks that take their first step at once: like any other task in all that comes after it."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar

import pytest

from services.router.eager import begin

WHERE = ContextVar("where", default="outside")


async def test_the_first_step_is_taken_at_once_and_the_rest_when_what_it_waits_for_is_there() -> None:
    seen, gate = list[str](), asyncio.Event()

    async def work() -> int:
        seen.append("begun")
        await gate.wait()
        seen.append("woken")
        await asyncio.sleep(0)
        return 7

    task = begin(work(), "worker")
    assert seen == ["begun"]
    assert not task.done()
    gate.set()
    assert await task == 7
    assert seen == ["begun", "woken"]
    assert task.get_name() == "worker"


async def test_what_is_there_before_the_next_turn_is_not_missed() -> None:
    future = asyncio.get_running_loop().create_future()

    async def work() -> str:
        return str(await future)

    task = begin(work(), "worker")
    future.set_result("early")
    assert await task == "early"


async def test_work_that_waits_for_nothing_has_its_result() -> None:
    async def work() -> int:
        return 3

    async def yielding() -> int:
        await asyncio.sleep(0)
        return 4

    assert await asyncio.gather(begin(work(), "a"), begin(yielding(), "b")) == [3, 4]


async def test_what_the_first_step_raises_is_the_tasks_outcome() -> None:
    async def work() -> None:
        raise KeyError("lost")

    async def leaving() -> None:
        raise asyncio.CancelledError

    with pytest.raises(KeyError):
        await begin(work(), "worker")
    left = begin(leaving(), "worker")
    await asyncio.wait({left})
    assert left.cancelled()


async def test_it_is_the_current_task_in_its_own_context_from_the_first_step_on() -> None:
    async def work() -> tuple[list[asyncio.Task[object] | None], str]:
        WHERE.set("inside")
        tasks = [asyncio.current_task()]
        await asyncio.sleep(0)
        return [*tasks, asyncio.current_task()], WHERE.get()

    outer = asyncio.current_task()
    task = begin(work(), "worker")
    assert asyncio.current_task() is outer
    assert WHERE.get() == "outside"
    assert await task == ([task, task], "inside")


async def test_from_a_callback_there_is_no_outer_task() -> None:
    begun: asyncio.Future[asyncio.Task[str]] = asyncio.get_running_loop().create_future()

    async def work() -> str:
        task = asyncio.current_task()
        return "" if task is None else task.get_name()

    asyncio.get_running_loop().call_soon(lambda: begun.set_result(begin(work(), "worker")))
    assert await (await begun) == "worker"


@pytest.mark.parametrize("turns", [0, 1])
async def test_cancelling_reaches_the_work_and_what_it_waits_for(turns: int) -> None:
    inner = asyncio.create_task(asyncio.Event().wait())
    seen = list[str]()

    async def work() -> None:
        try:
            await inner
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    task = begin(work(), "worker")
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task, inner})
    assert task.cancelled()
    assert inner.cancelled()
    assert seen == ["cancelled"]


async def test_work_may_refuse_to_be_cancelled() -> None:
    async def work() -> int:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)
        return 5

    task = begin(work(), "worker")
    task.cancel()
    assert await task == 5


async def test_a_time_limit_in_the_first_step_limits_the_work_and_not_who_began_it() -> None:
    async def work() -> str:
        try:
            async with asyncio.timeout(0):
                await asyncio.Event().wait()
        except TimeoutError:
            return "limited"
        return "not limited"

    task = begin(work(), "worker")
    await asyncio.sleep(0)
    assert await task == "limited"
