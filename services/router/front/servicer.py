"""RouterService on the wire."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing
from functools import partial
from typing import Any, TypeAlias

import grpc.aio
from google.protobuf.message import DecodeError
from microserve.router.v1 import router_pb2, router_pb2_grpc

from services.router.answer import Answer
from services.router.asking import Ask, Text, check_choices
from services.router.choices import deliver_choices, generate_choices
from services.router.errors import Draining, InvalidRequest, SlowConsumer, WrongKey
from services.router.front.conversation import Conversation, Say
from services.router.front.sessions import OpenSessions, client_of
from services.router.front.wire import Spelling, Terms, ask_of, chat_of, failed
from services.router.keys import Keys, shown_in
from services.router.service import GenerationService
from services.router.wait_limit import WaitedTooLong, WaitLimit
from services.rpc.deadline import earlier, time_left
from services.rpc.timing_messages import seconds_of

POLICY_METADATA = "x-microserve-policy"
PRIORITY_METADATA = "x-microserve-priority"
TENANT_METADATA = "x-microserve-tenant"
_SESSION_METHOD = "/microserve.router.v1.RouterService/Session"  # as logs of failures name it
READER = f"{_SESSION_METHOD} reader"  # the task's name

# Strings: generic in the stubs only.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_Session = Conversation[router_pb2.SessionOutput]


class RouterServicer(router_pb2_grpc.RouterServiceServicer):
    """Translates; what is done is GenerationService's."""

    def __init__(
        self,
        service: GenerationService,
        keys: Keys,
        sessions: OpenSessions[_Session],
        *,
        client_timeout_s: float,
        max_message_bytes: int,
    ) -> None:
        """`keys` are those that clients were asked for; here they tell whose the requests are."""
        self._service = service
        self._keys = keys
        self._client_timeout_s = client_timeout_s
        self._max_message_bytes = max_message_bytes
        self._sessions = sessions
        self._draining: Draining | None = None

    def drain(self) -> None:
        """Sessions take no new requests and end with those that run; other calls end by themselves."""
        self._draining = Draining("the router is about to stop")
        for session in self._sessions:
            session.end(self._draining)

    # A coroutine that writes, not a generator: grpc leaves a generator suspended when a call is cancelled during a
    # write, and the request would then end whenever the garbage collector finds it.
    async def Generate(  # type: ignore[override]
        self, request: router_pb2.GenerateRequest, context: Context
    ) -> None:
        ask, limit = self._ask(request, context), WaitLimit(self._client_timeout_s)
        spelling = Spelling(self._service, ask, echo=request.echo)
        try:
            async with aclosing(generate_choices(self._service, ask, request.n or 1)) as answers:
                async for choice, answer in answers:
                    for piece in spelling.pieces(choice, answer):
                        await limit.wait(context.write(piece))
        except WaitedTooLong:
            raise self._slow_consumer() from None
        finally:
            limit.stop()

    async def Session(  # type: ignore[override]
        self, request_iterator: AsyncIterator[router_pb2.SessionRequest], context: Context
    ) -> None:
        client = client_of(self._keys.check(shown_in(context.invocation_metadata())), context.peer())
        if self._draining is not None:
            raise self._draining  # also where no place is left
        session = _Session(_SESSION_METHOD, failed, max_message_bytes=self._max_message_bytes)
        with self._sessions.entered(session, client):
            await self._converse(session, request_iterator, context)

    async def Complete(self, request: router_pb2.CompleteRequest, context: Context) -> router_pb2.CompleteResponse:
        check_choices(request.request.n)
        ask = self._ask(request.request, context)
        spelling = Spelling(self._service, ask, echo=request.request.echo)
        choices = [router_pb2.GenerateResponse() for _ in range(request.request.n or 1)]
        texts: list[list[str]] = [[] for _ in choices]
        async with aclosing(generate_choices(self._service, ask, len(choices))) as answers:
            async for choice, answer in answers:
                for piece in spelling.pieces(choice, answer):
                    texts[choice].append(piece.text)
                    # Merging appends what is repeated and sets what is set, which each field is once.
                    choices[choice].MergeFrom(piece)
        for message, parts in zip(choices, texts, strict=True):
            message.text = "".join(parts)
        return router_pb2.CompleteResponse(response=choices[0], other_choices=choices[1:])

    async def Tokenize(self, request: router_pb2.TokenizeRequest, context: Context) -> router_pb2.TokenizeResponse:
        prompt = chat_of(request.chat) if request.WhichOneof("input") == "chat" else Text(request.text)
        return router_pb2.TokenizeResponse(token_ids=await self._service.encode(prompt, request.model))

    async def Detokenize(
        self, request: router_pb2.DetokenizeRequest, context: Context
    ) -> router_pb2.DetokenizeResponse:
        return router_pb2.DetokenizeResponse(text=self._service.decode(tuple(request.token_ids), request.model))

    async def ListModels(
        self, request: router_pb2.ListModelsRequest, context: Context
    ) -> router_pb2.ListModelsResponse:
        return router_pb2.ListModelsResponse(
            max_message_bytes=self._max_message_bytes,
            models=[
                router_pb2.ModelInfo(
                    name=model.key.name,
                    digest=model.key.digest,
                    max_context_length=model.max_context,
                    engine_count=len(model.members),
                )
                for model in self._service.models()
            ],
        )

    async def _converse(
        self, session: _Session, commands: AsyncIterator[router_pb2.SessionRequest], context: Context
    ) -> None:
        limit = WaitLimit(self._client_timeout_s)
        reader = asyncio.create_task(self._read(session, commands, context), name=READER)
        try:
            while outputs := await session.take():
                await limit.wait(context.write(router_pb2.SessionResponse(outputs=outputs)))
            reader.result()
        except WaitedTooLong:
            raise self._slow_consumer() from None
        finally:
            # All of it before anything is awaited: another cancellation may end the wait.
            limit.stop()
            reader.cancel()
            session.cancel_all()
            await asyncio.gather(session.over(), reader, return_exceptions=True)

    def _slow_consumer(self) -> SlowConsumer:
        return SlowConsumer(f"the client took nothing for {self._client_timeout_s:g} s")

    async def _read(
        self, session: _Session, commands: AsyncIterator[router_pb2.SessionRequest], context: Context
    ) -> None:
        """Carries commands out until no more come."""
        terms, shown, last_id = _terms(context), shown_in(context.invocation_metadata()), None
        try:
            async for command in commands:
                match command.WhichOneof("command"):
                    case "generate":
                        call = command.generate
                        if last_id is not None and call.call_id <= last_id:
                            raise InvalidRequest(f"call_id {call.call_id} comes after {last_id}")
                        last_id = call.call_id
                        its_terms = _terms_of(call, terms, time_left(context))
                        session.begin(last_id, partial(self._answer, session, call, its_terms, shown))
                    case "cancel":
                        session.cancel(command.cancel.call_id)
                    case None:
                        raise InvalidRequest("a session request has no command that is known here")
                if not session.has_room:
                    await session.wait_for_room()
        except DecodeError:
            session.end(InvalidRequest("a session request is no message of this contract"))
        except InvalidRequest as error:
            session.end(error)
        finally:
            session.end()

    def _answer(
        self,
        session: _Session,
        call: router_pb2.GenerateCall,
        terms: Terms,
        shown: bytes,
        say: Say[router_pb2.SessionOutput],
    ) -> Coroutine[Any, Any, None]:
        call_id, num_live = call.call_id, call.request.n or 1
        # Each time: a key may be taken away, or change hands, while the stream is open.
        try:
            owner = self._keys.check(shown)
        except WrongKey as error:
            session.end(error)  # it would keep a place from those who may call
            raise
        ask = ask_of(call.request, terms, owner)
        spelling = Spelling(self._service, ask, echo=call.request.echo)

        def take(choice: int, answer: Answer) -> bool:
            nonlocal num_live
            if answer.finish is not None:
                num_live -= 1
            output = router_pb2.SessionOutput(call_id=call_id, last=not num_live)
            for before in spelling.write(output.response, choice, answer):
                say(router_pb2.SessionOutput(call_id=call_id, response=before))
            return say(output)

        return deliver_choices(self._service, ask, num_live, take, session.wait_for_room)

    def _ask(self, request: router_pb2.GenerateRequest, context: Context) -> Ask:
        """What a call of its own asks for."""
        return ask_of(request, _terms(context), self._keys.check(shown_in(context.invocation_metadata())))


def _terms(context: Context) -> Terms:
    """As call metadata says them."""
    said = {key: str(value) for key, value in context.invocation_metadata() or ()}
    return Terms(
        said.get(POLICY_METADATA, ""),
        said.get(PRIORITY_METADATA, ""),
        said.get(TENANT_METADATA, ""),
        time_left(context),
    )


def _terms_of(call: router_pb2.GenerateCall, stream: Terms, left_s: float | None) -> Terms:
    """Those of a request of a session whose stream has so much time left."""
    if call.HasField("timeout"):
        left_s = earlier(left_s, seconds_of(call.timeout))
    return Terms(
        call.policy or stream.policy,
        call.priority or stream.priority,
        call.tenant or stream.tenant,
        left_s,
    )
