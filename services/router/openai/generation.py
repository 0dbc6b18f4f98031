"""A call that generates: its body is read, answered whole or as server-sent events, and given up with its client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from starlette.datastructures import Headers as HttpHeaders
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from services.protocol.errors import ServiceError
from services.router.answering import Answer
from services.router.choices import generate_choices, merge
from services.router.errors import EngineLost
from services.router.fleet.registry import Model
from services.router.keys import tenant_of
from services.router.openai.calls import Call, Headers
from services.router.openai.errors import Refusal, refusal
from services.router.openai.fields import Fields
from services.router.openai.shapes import ChatShape, Choice, CompletionShape, Json, Offsets, Wishes
from services.router.openai.told import Told
from services.router.service import GenerationService
from services.router.values import FinishReason

# In a scope: the tenant whose key the client has shown, empty: no tenant's.
OWNER = "microserve.owner"
_BODY_TIMEOUT_S = 60.0
_DONE = b"data: [DONE]\n\n"


class ClientGone(Exception):
    """Nobody is there any more who could be answered."""


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """The largest body taken, how long a client may take to accept a piece of its answer, and how many calls are under
    way at once, those whose bodies are still coming among them."""

    max_body_bytes: int
    client_timeout_s: float
    max_calls: int


class Generation:
    """One of the two paths that generate: `read` understands its bodies, `shape` spells its answers."""

    def __init__(
        self,
        service: GenerationService,
        read: Callable[[Fields, Headers], Call],
        shape: type[ChatShape] | type[CompletionShape],
        limits: HttpLimits,
    ) -> None:
        self._service = service
        self._read = read
        self._shape = shape
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = HttpHeaders(scope=scope)
        body = await _body(receive, headers, self._limits.max_body_bytes)
        named = Headers(
            headers.get("x-microserve-policy", ""),
            headers.get("x-request-id", ""),
            headers.get("x-microserve-priority", ""),
            tenant_of(scope[OWNER], headers.get("x-microserve-tenant", "")),
        )
        call = self._read(Fields.parse(body), named)
        await _while_there(receive, self._answer(call, scope, receive, send))

    async def _answer(self, call: Call, scope: Scope, receive: Receive, send: Send) -> None:
        model = self._service.model(call.asks[0].model)
        async with aclosing(self._choices(call)) as pieces:
            # Whatever is wrong with the request shows before the first piece, when the status can still tell.
            first = await anext(pieces)
            answers = _Answers(call, self._new_shape(call, model, first[1].request_id), self._service)
            header = {"x-request-id": first[1].request_id}
            if call.stream:
                await _stream(send, header, answers.events(first, pieces), self._limits.client_timeout_s)
            else:
                whole = await answers.whole(first, pieces)
                await JSONResponse(whole, headers=header)(scope, receive, send)

    async def _choices(self, call: Call) -> AsyncGenerator[tuple[int, Answer], None]:
        """(choice, piece) over all asks, which begin together or not at all."""
        are_many = len(call.asks) > 1  # one enters by itself
        with self._service.entering(call.asks[0], call.n, len(call.asks)) if are_many else nullcontext():
            asks = [replace(ask, has_entered=are_many) for ask in call.asks]
            async with aclosing(merge([generate_choices(self._service, ask, call.n) for ask in asks])) as pieces:
                async for ask, (choice, answer) in pieces:
                    yield ask * call.n + choice, answer

    def _new_shape(self, call: Call, model: Model, request_id: str) -> ChatShape | CompletionShape:
        return self._shape(
            request_id=request_id,
            model=model.key.name,
            fingerprint=f"fp_{model.key.digest.hex()[:12]}",
            tokenizer=model.tokenizer,
            wishes=Wishes(call.asks[0].sampling.logprobs, call.echo, call.prompt_logprobs),
        )


Pieces = AsyncGenerator[tuple[int, Answer], None]


class _Answers:
    """All choices of one call, from pieces to JSON."""

    def __init__(self, call: Call, shape: ChatShape | CompletionShape, service: GenerationService) -> None:
        self._call = call
        self._shape = shape
        self._service = service
        self._choices = [Choice() for _ in range(len(call.asks) * call.n)]
        self._begun: set[int] = set()
        self._told: dict[int, Told] = {}  # by ask, which tell of their prompt with choice 0

    async def whole(self, first: tuple[int, Answer], pieces: Pieces) -> Json:
        """One JSON object."""
        texts: list[list[str]] = [[] for _ in self._choices]
        async for index, answer in _chain(first, pieces):
            texts[index].append(self._take(index, answer))
            self._choices[index].logprobs.extend(answer.logprobs)
        for choice, parts in zip(self._choices, texts, strict=True):
            choice.text = "".join(parts)
        return self._shape.whole(self._choices, len(self._call.asks))

    async def events(self, first: tuple[int, Answer], pieces: Pieces) -> AsyncGenerator[bytes, None]:
        """Server-sent events. A failure on the way is the last of them."""
        offsets = [Offsets() for _ in self._choices]
        usage: Json = {"usage": None} if self._call.include_usage else {}
        try:
            async for index, answer in _chain(first, pieces):
                is_first = index not in self._begun
                if is_first and (opening := self._shape.opening(index)) is not None:
                    yield _event(opening | usage)
                text = self._take(index, answer)
                if text or answer.logprobs or answer.finish is not None:
                    told = self._choices[index].told if is_first else None
                    part = Choice(text, told, list(answer.logprobs), answer.finish)
                    yield _event(self._shape.piece(index, part, offsets[index]) | usage)
        except ServiceError as error:
            yield _event(refusal(error).body())
            return
        if self._call.include_usage:
            yield _event(self._shape.closing(self._choices, len(self._call.asks)))
        yield _DONE

    def _take(self, index: int, answer: Answer) -> str:
        """Notes how far the choice is; returns its new text, a wished-for echo included."""
        if answer.finish is FinishReason.CANCELLED:
            raise EngineLost("an engine cancelled the request before it ended")
        choice = self._choices[index]
        choice.finish, choice.usage = answer.finish, answer.usage
        text = answer.text
        if index not in self._begun:
            ask, is_other = divmod(index, self._call.n)
            if self._call.echo:
                text = self._service.echo(self._call.asks[ask], answer.prompt_ids) + text
            if self._call.asks[ask].sampling.prompt_logprobs is not None:
                if not is_other:
                    self._told[ask] = Told(answer.prompt_ids, answer.prompt_logprobs)
                choice.told = self._told[ask]
        self._begun.add(index)
        return text


async def _chain(first: tuple[int, Answer], pieces: Pieces) -> Pieces:
    yield first
    async for piece in pieces:
        yield piece


def _event(value: Json) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def _stream(
    send: Send, headers: dict[str, str], events: AsyncGenerator[bytes, None], client_timeout_s: float
) -> None:
    """Sends events as they come. ClientGone if the client takes nothing for too long."""
    shown: Sequence[tuple[str, str]] = [
        ("content-type", "text/event-stream; charset=utf-8"),
        ("cache-control", "no-cache"),
        ("x-accel-buffering", "no"),
        *headers.items(),
    ]
    encoded = [(name.encode(), value.encode("latin-1")) for name, value in shown]  # as headers come
    await send({"type": "http.response.start", "status": 200, "headers": encoded})
    async with aclosing(events):
        async for event in events:
            try:
                async with asyncio.timeout(client_timeout_s):
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            except TimeoutError:
                raise ClientGone from None
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _while_there(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Does the work; cancels it when the client disconnects. ClientGone."""
    working, leaving = asyncio.create_task(work), asyncio.create_task(_left(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
            await asyncio.wait({working})
    if working.cancelled():
        raise ClientGone
    await working


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _body(receive: Receive, headers: HttpHeaders, limit: int) -> bytes:
    """The whole body. Refusal if it is too large or too slow, ClientGone."""
    announced = headers.get("content-length", "")
    body = bytearray()
    if announced.isdecimal() and int(announced[:20]) > limit:
        raise _too_large(limit)
    try:
        async with asyncio.timeout(_BODY_TIMEOUT_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                body += message.get("body", b"")
                if len(body) > limit:
                    raise _too_large(limit)
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise Refusal(408, f"the body did not come within {_BODY_TIMEOUT_S:g} s", "timeout") from None


def _too_large(limit: int) -> Refusal:
    return Refusal(413, f"the body is larger than {limit} bytes", "request_too_large")
