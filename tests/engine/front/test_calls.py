"""One question, one answer, and nothing left behind when the asker leaves."""

from __future__ import annotations

import asyncio

import pytest

from services.engine.core.api import Abort, Cancel, Command, RequestKey
from services.engine.errors import EngineStopped, QueueFull
from services.engine.front.calls import Calls
from services.engine.front.outbox import Outbox

KEY = RequestKey("owner", "request")


class Asked:
    """Calls whose commands and abandoned keys are kept."""

    def __init__(self) -> None:
        self.commands: list[Command] = []
        self.abandoned: list[RequestKey] = []
        self.calls = Calls(self.commands.append, self.abandoned.append, Outbox())

    async def ask(self) -> asyncio.Task[None]:
        """A verb under way, which the loop thread knows of."""
        task = asyncio.create_task(self.calls.ask_for(KEY, lambda reply: Abort(KEY, reply)))
        await asyncio.sleep(0)
        return task

    def reply(self, index: int, value: object) -> None:
        command = self.commands[index]
        assert isinstance(command, Abort)
        command.reply(value)  # type: ignore[arg-type]


async def test_an_answer_from_another_thread_arrives() -> None:
    asked = Asked()
    task = await asked.ask()
    await asyncio.to_thread(asked.reply, 0, None)
    assert await task is None


async def test_an_error_is_raised() -> None:
    asked = Asked()
    task = await asked.ask()
    asked.reply(0, QueueFull("full"))
    with pytest.raises(QueueFull):
        await task


async def test_an_asker_that_leaves_cancels_the_verb() -> None:
    asked = Asked()
    task = await asked.ask()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert asked.commands[1:] == [Cancel(KEY)]
    assert asked.abandoned == [KEY]
    asked.reply(0, None)  # the late answer finds nobody
    await asyncio.sleep(0)


async def test_leaving_in_the_very_moment_of_the_answer_cancels_too() -> None:
    asked = Asked()
    task = await asked.ask()
    asked.reply(0, None)
    await asyncio.sleep(0)  # the answer is there, the asker has not run yet
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()
    assert asked.commands[1:] == [Cancel(KEY)]


async def test_a_retry_that_leaves_spares_the_original() -> None:
    asked = Asked()
    original, retry = await asked.ask(), await asked.ask()
    retry.cancel()
    await asyncio.gather(retry, return_exceptions=True)
    assert asked.abandoned == [], "somebody still waits"
    assert asked.commands[2:] == [Cancel(KEY)], "the loop thread counts those who joined"
    asked.reply(0, None)
    await original
    late = await asked.ask()
    late.cancel()
    await asyncio.gather(late, return_exceptions=True)
    assert sum(isinstance(command, Cancel) for command in asked.commands) == 1, "what was answered lives on"


async def test_a_failed_engine_answers_all_and_takes_no_more() -> None:
    asked = Asked()
    task = await asked.ask()
    asked.calls.fail(EngineStopped("broken"))
    with pytest.raises(EngineStopped):
        await task
    with pytest.raises(EngineStopped):
        await asked.calls.ask_for(KEY, lambda reply: Abort(KEY, reply))
    assert len(asked.commands) == 1
