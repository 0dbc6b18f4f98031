"""Requests of one stream: order, room, and how each of them ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

from services.protocol.errors import ServiceError
from services.router.errors import Draining, NoEngine
from services.router.front.conversation import MAX_FRAME_BYTES, MAX_WAITING_BYTES, Conversation, Say

MAX_MESSAGE_BYTES = 4 * MAX_WAITING_BYTES


@dataclass(frozen=True)
class Said:
    call_id: int
    text: str = ""
    last: bool = False
    size: int = 10

    def ByteSize(self) -> int:
        return self.size


def failed(call_id: int, error: ServiceError) -> Said:
    return Said(call_id, f"{error.code.name} {error.reason}", last=True)


def saying(talk: Conversation[Said], *outputs: Said) -> Callable[[Say[Said]], Coroutine[Any, Any, None]]:
    async def answer(say: Say[Said]) -> None:
        for output in outputs:
            if not say(output):
                await talk.wait_for_room()

    return answer


@asynccontextmanager
async def conversation() -> AsyncIterator[Conversation[Said]]:
    made = Conversation[Said]("/service/Session", failed, max_message_bytes=MAX_MESSAGE_BYTES)
    try:
        yield made
    finally:
        made.cancel_all()
        await made.over()


async def everything(of: Conversation[Said]) -> list[Said]:
    """What comes until all is over."""
    said: list[Said] = []
    while taken := await of.take():
        said += taken
    return said


class Standing:
    """A request that says one thing and then stands until it is let go, or for ever."""

    def __init__(self, call_id: int) -> None:
        self.call_id = call_id
        self.reached, self.go_on, self.tidied = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def answer(self, say: Say[Said]) -> None:
        try:
            say(Said(self.call_id, "begun"))
            self.reached.set()
            await self.go_on.wait()
            say(Said(self.call_id, "done", last=True))
        finally:
            self.tidied.set()


async def test_none_waits_for_another_and_all_end_before_the_conversation() -> None:
    async with conversation() as talk:
        slow, quick = Standing(1), [Said(2, "a"), Said(2, "b", last=True)]
        talk.begin(1, slow.answer)
        talk.begin(2, saying(talk, *quick))
        talk.end()
        got: list[Said] = []
        while len(got) < 3:
            got += await talk.take()
        assert sorted(got, key=lambda said: said.call_id) == [Said(1, "begun"), *quick]
        slow.go_on.set()
        assert await everything(talk) == [Said(1, "done", last=True)]


async def test_a_frame_is_bounded_but_for_one_large_output() -> None:
    sizes = [MAX_FRAME_BYTES - 10, 10, 1, 2 * MAX_FRAME_BYTES, 1]
    async with conversation() as talk:
        talk.begin(1, saying(talk, *(Said(1, size=size) for size in sizes)))
        talk.end()
        frames = [[said.size for said in await talk.take()] for _ in range(4)]
        assert frames == [sizes[:2], [1], [2 * MAX_FRAME_BYTES], [1]]
        assert await talk.take() == []


async def test_requests_wait_while_too_much_is_untaken() -> None:
    num_said = 0

    async def talkative(say: Say[Said]) -> None:
        nonlocal num_said
        for _ in range(3):
            num_said += 1
            if not say(Said(1, size=MAX_WAITING_BYTES)):
                await talk.wait_for_room()

    async with conversation() as talk:
        talk.begin(1, talkative)
        waiting = asyncio.create_task(talk.wait_for_room())
        for number in range(1, 4):
            for _ in range(10):
                await asyncio.sleep(0)
            assert (num_said, waiting.done()) == (number, False)
            assert await talk.take() == [Said(1, size=MAX_WAITING_BYTES)]
            waiting.cancel()
            waiting = asyncio.create_task(talk.wait_for_room())
        await waiting
        talk.end()
        assert await everything(talk) == []


async def test_what_fits_into_no_message_fails_its_request_alone() -> None:
    async with conversation() as talk:
        talk.begin(1, saying(talk, Said(1, "begun"), Said(1, size=MAX_MESSAGE_BYTES, last=True)))
        talk.begin(2, saying(talk, Said(2, size=MAX_MESSAGE_BYTES - 16, last=True)))
        talk.end()
        said = await everything(talk)
        assert [each.text for each in said if each.call_id == 1] == ["begun", "INVALID_ARGUMENT INVALID_REQUEST"]
        assert [each.size for each in said if each.call_id == 2] == [MAX_MESSAGE_BYTES - 16]


async def test_one_that_is_cancelled_says_so_tidies_up_and_no_other_is() -> None:
    async with conversation() as talk:
        doomed, spared = Standing(1), Standing(2)
        for each in (doomed, spared):
            talk.begin(each.call_id, each.answer)
            await each.reached.wait()
        for call_id in (7, 1, 1):
            talk.cancel(call_id)
        await doomed.tidied.wait()
        spared.go_on.set()
        talk.end()
        said = await everything(talk)
        assert [each.text for each in said if each.call_id == 1] == ["begun", "CANCELLED REQUEST_CANCELLED"]
        assert [each.text for each in said if each.call_id == 2] == ["begun", "done"]


async def test_one_that_is_cancelled_in_the_turn_that_began_it_says_so_too() -> None:
    async def answer(say: Say[Said]) -> None:
        await asyncio.Event().wait()

    async with conversation() as talk:
        talk.begin(1, answer)
        talk.cancel(1)
        talk.end()
        assert await everything(talk) == [Said(1, "CANCELLED REQUEST_CANCELLED", last=True)]


async def test_nothing_is_said_after_the_last_output() -> None:
    ending = asyncio.Event()

    async def slow_to_end(say: Say[Said]) -> None:
        say(Said(1, "done", last=True))
        ending.set()
        await asyncio.Event().wait()

    async def fails_at_its_end(say: Say[Said]) -> None:
        say(Said(2, "done", last=True))
        raise NoEngine("too late")

    async with conversation() as talk:
        talk.begin(1, slow_to_end)
        talk.begin(2, fails_at_its_end)
        await ending.wait()
        talk.cancel(1)
        talk.end()
        assert sorted(await everything(talk), key=lambda said: said.call_id) == [
            Said(1, "done", last=True),
            Said(2, "done", last=True),
        ]


async def test_a_failure_is_the_requests_own(caplog: pytest.LogCaptureFixture) -> None:
    async def failing(error: BaseException, say: Say[Said]) -> None:
        raise error

    async with conversation() as talk:
        talk.begin(1, partial(failing, NoEngine("none")))
        with caplog.at_level(logging.ERROR):
            talk.begin(2, partial(failing, ZeroDivisionError("a bug")))
            talk.begin(3, partial(failing, asyncio.CancelledError()))  # of a task that it waited for
            talk.begin(4, saying(talk, Said(4, "fine", last=True)))
            talk.end()
            said = await everything(talk)
    assert {each.call_id: each.text for each in said} == {
        1: "UNAVAILABLE NO_ENGINE",
        2: "INTERNAL INTERNAL",
        3: "INTERNAL INTERNAL",
        4: "fine",
    }
    assert all(each.last for each in said)
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]


async def test_what_comes_after_its_end_is_told_why() -> None:
    async with conversation() as talk:
        open_one = Standing(1)
        talk.begin(1, open_one.answer)
        await open_one.reached.wait()
        talk.end(Draining("soon"))
        talk.end(NoEngine("a later cause"))
        talk.begin(2, saying(talk, Said(2, "never")))
        open_one.go_on.set()
        said = await talk.take()
        while len(said) < 3:
            said += await talk.take()
        with pytest.raises(Draining):
            await talk.take()
        assert {each.text for each in said} == {"begun", "done", "UNAVAILABLE DRAINING"}


async def test_all_are_cancelled_at_once() -> None:
    """Whoever ends the stream may itself be cancelled before it can wait."""
    talk = Conversation[Said]("/service/Session", failed, max_message_bytes=MAX_MESSAGE_BYTES)
    requests = [Standing(number) for number in range(3)]
    for each in requests:
        talk.begin(each.call_id, each.answer)
        await each.reached.wait()
    talk.cancel_all()
    for each in requests:
        await each.tidied.wait()
    await talk.over()


async def test_an_error_that_cannot_be_told_leaves_nothing_open() -> None:
    def cannot_tell(call_id: int, error: ServiceError) -> Said:
        raise ValueError("no text")

    async def fails(say: Say[Said]) -> None:
        await asyncio.sleep(0)
        raise NoEngine("none")

    talk = Conversation[Said]("/service/Session", cannot_tell, max_message_bytes=MAX_MESSAGE_BYTES)
    talk.begin(1, fails)
    [task] = talk._open.values()
    talk.end()
    with pytest.raises(ValueError, match="no text"):
        await task
    assert await talk.take() == []
