"""A call that generates: its body is read, answered whole or as server-sent events, and given up with its client."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing, nullcontext
from dataclasses import dataclass, replace

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from services.protocol.errors import ServiceError
from services.router.answer import Answer
from services.router.choices import deliver_choices, generate_choices, merge
from services.router.fleet.registry import Model
from services.router.http import CLIENT, Client, ClientGone
from services.router.keys import tenant_of
from services.router.openai.answers import Answers
from services.router.openai.calls import Call, Headers
from services.router.openai.errors import Refusal, cut_off, refusal
from services.router.openai.events import DONE, EventStream, Spelling, event
from services.router.openai.fields import Fields
from services.router.openai.shapes import ChatShape, CompletionShape, Wishes
from services.router.service import GenerationService

# In a scope: the tenant whose key the client has shown, empty: no tenant's; and what the request is called in logs.
OWNER, REQUEST_ID = "microserve.owner", "microserve.request_id"
_BODY_TIMEOUT_S = 60.0
_NAMES = (b"x-microserve-policy", b"x-microserve-priority", b"x-microserve-tenant")


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
        client: Client = scope["state"][CLIENT]
        headers = dict(reversed(scope["headers"]))  # the first of a name counts
        body = await _body(receive, client, headers.get(b"content-length", b""), self._limits.max_body_bytes)
        policy, priority, tenant = (headers.get(name, b"").decode("latin-1") for name in _NAMES)
        owner = scope[OWNER]
        named = Headers(policy, scope[REQUEST_ID], priority, tenant_of(owner, tenant), owner)
        call = self._read(Fields.parse(body), named)
        if call.stream:
            stream = EventStream(send, client, self._limits.client_timeout_s)
            try:
                await client.stays_for(self._answer_in_pieces(call, stream))
            except asyncio.CancelledError as error:  # not by the client
                if not stream.has_begun:
                    raise
                await stream.end(event(cut_off(error, scope["path"]).body()))
        else:
            await client.stays_for(self._answer(call, scope, receive, send))

    async def _answer(self, call: Call, scope: Scope, receive: Receive, send: Send) -> None:
        model = self._service.model(call.asks[0].model)
        answers = Answers(call, self._service)
        texts: list[list[str]] = [[] for _ in answers.choices]

        def take(index: int, answer: Answer) -> bool:
            texts[index].append(answers.take(index, answer))
            answers.choices[index].logprobs.extend(answer.logprobs)
            return True

        await self._deliver(call, take, _room)
        for choice, parts in zip(answers.choices, texts, strict=True):
            choice.text = "".join(parts)
        whole = self._new_shape(call, model).whole(answers.choices, len(call.asks))
        await JSONResponse(whole)(scope, receive, send)

    async def _answer_in_pieces(self, call: Call, stream: EventStream) -> None:
        model = self._service.model(call.asks[0].model)
        spelling: Spelling | None = None

        def take(index: int, answer: Answer) -> bool:
            nonlocal spelling
            if spelling is None:
                shape = self._new_shape(call, model)
                spelling = Spelling(Answers(call, self._service), shape, include_usage=call.include_usage)
                stream.begin()
            return stream.put(spelling.piece(index, answer))

        try:
            await self._deliver(call, take, stream.wait_for_room)
        except ServiceError as error:
            if spelling is None:  # the status can still tell
                raise
            await stream.end(event(refusal(error).body()))
            return
        assert spelling is not None  # no call is answered by nothing
        await stream.end(spelling.closing(len(call.asks)) + DONE)

    async def _deliver(
        self, call: Call, take: Callable[[int, Answer], bool], wait_for_room: Callable[[], Awaitable[None]]
    ) -> None:
        """As choices.deliver_choices, over all asks. All are counted before the first begins, but each waits for a turn
        of its own; one that is refused then ends the call."""
        if len(call.asks) == 1:
            await deliver_choices(self._service, call.asks[0], call.n, take, wait_for_room)
            return
        with self._service.entering(call.asks[0], call.n, len(call.asks)):
            asks = [replace(ask, has_entered=True) for ask in call.asks]
            async with aclosing(merge([generate_choices(self._service, ask, call.n) for ask in asks])) as pieces:
                async for ask, (choice, answer) in pieces:
                    if not take(ask * call.n + choice, answer):
                        await wait_for_room()

    def _new_shape(self, call: Call, model: Model) -> ChatShape | CompletionShape:
        return self._shape(
            request_id=call.asks[0].request_id,
            model=model.key.name,
            fingerprint=f"fp_{model.key.digest.hex()[:12]}",
            tokenizer=model.tokenizer,
            wishes=Wishes(call.asks[0].sampling.logprobs, call.echo, call.prompt_logprobs),
        )


async def _room() -> None:
    """There is always some for what is answered whole."""


async def _body(receive: Receive, client: Client, announced: bytes, limit: int) -> bytes:
    """The whole body. Refusal if it is too large or too slow, ClientGone."""
    if announced.isdigit() and int(announced[:20]) > limit:
        raise _too_large(limit)
    body = bytearray()
    try:
        async with nullcontext() if client.has_spoken else asyncio.timeout(_BODY_TIMEOUT_S):
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
