"""Answers as server-sent events: spelled, and written to their client."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Awaitable

from starlette.types import Message, Send

from services.router.answer import Answer
from services.router.http import Client, ClientGone
from services.router.openai.answers import Answers
from services.router.openai.shapes import ChatShape, Choice, CompletionShape, Json, Offsets

DONE = b"data: [DONE]\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
# Stands for a text that is put in later. Only what the server says itself comes after a text.
_SOME_TEXT = "\0"


def event(value: Json) -> bytes:
    """One event."""
    return b"data: " + _JSON.encode(value).encode() + b"\n\n"


class Spelling:
    """The events of one call."""

    def __init__(self, answers: Answers, shape: ChatShape | CompletionShape, *, include_usage: bool) -> None:
        self._answers = answers
        self._shape = shape
        self._usage: Json = {"usage": None} if include_usage else {}
        self._offsets = [Offsets() for _ in answers.choices]
        self._around: dict[int, tuple[bytes, bytes]] = {}  # by choice: an event that tells nothing but a text

    def piece(self, index: int, answer: Answer) -> bytes:
        """What a piece of a choice adds, perhaps no event."""
        is_first = not self._answers.has_begun(index)
        text = self._answers.take(index, answer)
        events = self._opening(index) if is_first else b""
        if not (text or answer.logprobs or answer.finish is not None):
            return events
        told = self._answers.choices[index].told if is_first else None
        if self._shape.wishes.logprobs is None and told is None and answer.finish is None:
            before, after = self._around.get(index) or self._frame(index)
            return events + before + _JSON.encode(text).encode() + after
        return events + self._event(index, Choice(text, told, list(answer.logprobs), answer.finish))

    def closing(self, num_asks: int) -> bytes:
        """The event that tells the usage, if it was asked for."""
        return event(self._shape.closing(self._answers.choices, num_asks)) if self._usage else b""

    def _opening(self, index: int) -> bytes:
        opening = self._shape.opening(index)
        return b"" if opening is None else event(opening | self._usage)

    def _event(self, index: int, part: Choice) -> bytes:
        return event(self._shape.piece(index, part, self._offsets[index]) | self._usage)

    def _frame(self, index: int) -> tuple[bytes, bytes]:
        before, _, after = self._event(index, Choice(_SOME_TEXT)).rpartition(_JSON.encode(_SOME_TEXT).encode())
        self._around[index] = before, after
        return before, after


class EventStream:
    """Events on their way to a client, each written at once while the connection has room."""

    def __init__(self, send: Send, client: Client, client_timeout_s: float) -> None:
        self._send = send
        self._client = client
        self._client_timeout_s = client_timeout_s
        self._waiting: deque[Message] = deque()
        self.has_begun = False

    def begin(self) -> None:
        """Comes before the first event."""
        self.has_begun = True
        self._put({"type": "http.response.start", "status": 200, "headers": _HEADERS})

    def put(self, events: bytes) -> bool:
        """Some events; False: wait_for_room() comes before the next."""
        return self._put({"type": "http.response.body", "body": events, "more_body": True}) if events else True

    async def end(self, events: bytes) -> None:
        """The last ones. ClientGone."""
        if not self._put({"type": "http.response.body", "body": events, "more_body": False}):
            await self.wait_for_room()

    async def wait_for_room(self) -> None:
        """Until nothing waits. ClientGone if the client takes nothing for too long."""
        while self._waiting:
            try:
                async with asyncio.timeout(self._client_timeout_s):
                    await self._send(self._waiting[0])
            except TimeoutError:
                raise ClientGone from None
            self._waiting.popleft()  # now, since what comes meanwhile comes after it

    def _put(self, message: Message) -> bool:
        if self._waiting or not self._client.has_room:
            self._waiting.append(message)
            return False
        _at_once(self._send(message))
        return True


def _at_once(sending: Awaitable[None]) -> None:
    """Does what has nothing to wait for."""
    try:
        sending.__await__().send(None)
    except StopIteration:
        return
    raise RuntimeError("a connection that had room made its writer wait")
