"""Server-sent events: how they are spelled, and what becomes of them while their client takes nothing."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from services.router.answer import Answer
from services.router.asking import Ask, Text
from services.router.http import Client, ClientGone
from services.router.openai.answers import Answers
from services.router.openai.calls import Call
from services.router.openai.events import EventStream, Spelling, event
from services.router.openai.shapes import ChatShape, Choice, CompletionShape, Offsets, Wishes
from services.router.values import Sampling

BODY = "http.response.body"


class Connection:
    """What a stream sends to; while it has no room, a send waits."""

    def __init__(self) -> None:
        self.client = Client()
        self.sent: list[Any] = []
        self.room = asyncio.Event()
        self.room.set()

    async def send(self, message: Any) -> None:
        await self.room.wait()
        self.sent.append(message)

    def fill(self) -> None:
        self.client.has_room = False
        self.room.clear()

    def stream(self, client_timeout_s: float = 60.0) -> EventStream:
        return EventStream(self.send, self.client, client_timeout_s)


@pytest.mark.parametrize("shape_type", [ChatShape, CompletionShape])
@pytest.mark.parametrize("include_usage", [False, True])
def test_an_event_of_text_alone_is_spelled_as_any_other(
    shape_type: type[ChatShape] | type[CompletionShape], include_usage: bool
) -> None:
    call = Call((Ask(Text("x"), Sampling()),), 2, stream=True, include_usage=include_usage)
    # The caller chooses the name.
    shape: Any = shape_type('of"\\u0000"\0', "a model", "fp", tokenizer=None, wishes=Wishes())  # type: ignore[arg-type]
    spelling = Spelling(Answers(call, service=None), shape, include_usage=include_usage)  # type: ignore[arg-type]
    usage = {"usage": None} if include_usage else {}
    spelling.piece(1, Answer("first"))
    for text in ('so "quoted"', "größe 🙂\n\\n", "\0", "\x7f\u2028"):
        expected = shape.piece(1, Choice(text), Offsets()) | usage
        spelled = spelling.piece(1, Answer(text))
        assert spelled == event(expected)
        assert json.loads(spelled.removeprefix(b"data: ")) == expected
        assert b"\n" not in spelled[:-2]


async def test_events_go_at_once_while_there_is_room_and_in_order_when_there_is_again() -> None:
    connection = Connection()
    stream = connection.stream()
    stream.begin()
    assert stream.put(b"one")
    assert [message["type"] for message in connection.sent] == ["http.response.start", BODY]
    connection.fill()
    assert not stream.put(b"two")
    waiting = asyncio.create_task(stream.wait_for_room())
    await asyncio.sleep(0)
    connection.client.has_room = True
    assert not stream.put(b"three")  # there is room, and another one comes first
    connection.room.set()
    await waiting
    assert stream.put(b"four")
    await stream.end(b"five")
    bodies = [(message["body"], message["more_body"]) for message in connection.sent[1:]]
    assert bodies == [(each, each != b"five") for each in (b"one", b"two", b"three", b"four", b"five")]


async def test_who_takes_nothing_for_too_long_is_gone() -> None:
    connection = Connection()
    stream = connection.stream(client_timeout_s=0.01)
    connection.fill()
    stream.begin()
    with pytest.raises(ClientGone):
        await stream.end(b"never")
    assert connection.sent == []


async def test_a_connection_that_has_no_room_and_says_otherwise_is_an_error() -> None:
    connection = Connection()
    connection.room.clear()
    with pytest.raises(RuntimeError, match="made its writer wait"):
        connection.stream().begin()
