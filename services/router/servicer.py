"""RouterService on the wire."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import aclosing
from typing import Any

import grpc.aio
from microserve.router.v1 import router_pb2, router_pb2_grpc

from services.router.answering import Answer
from services.router.asking import Ask, Chat, Prompt, Text, Tokens, check_choices, new_seed
from services.router.choices import generate_choices
from services.router.errors import EmptyPrompt, SlowConsumer
from services.router.prompt_logprobs import PromptLogprobs
from services.router.service import GenerationService
from services.router.text.template import ChatMessage
from services.router.wait_limit import WaitLimit
from services.router.wire import finish_to_wire, leg_to_wire, logprobs_to_wire, prompt_to_wire, sampling_from_wire
from services.rpc.deadline import time_left

POLICY_METADATA = "x-microserve-policy"
PRIORITY_METADATA = "x-microserve-priority"
TENANT_METADATA = "x-microserve-tenant"
# Of a prompt in one message: at about five bytes each, an eighth of what a message may hold.
MAX_PROMPT_NUMBERS = 100_000

Context = grpc.aio.ServicerContext[Any, Any]


class RouterServicer(router_pb2_grpc.RouterServiceServicer):
    """Translates; what is done is GenerationService's."""

    def __init__(self, service: GenerationService, *, client_timeout_s: float) -> None:
        self._service = service
        self._client_timeout_s = client_timeout_s

    # A coroutine that writes, not a generator: grpc leaves a generator suspended when a call is cancelled during a
    # write, and the request would then end whenever the garbage collector finds it.
    async def Generate(  # type: ignore[override]
        self, request: router_pb2.GenerateRequest, context: Context
    ) -> None:
        ask, limit = _ask(request, context), WaitLimit(self._client_timeout_s)
        spelling = _Spelling(self._service, ask, echo=request.echo)
        try:
            async with aclosing(generate_choices(self._service, ask, request.n or 1)) as answers:
                async for choice, answer in answers:
                    for piece in spelling.pieces(choice, answer):
                        try:
                            await limit.wait(context.write(piece))
                        except TimeoutError:
                            raise SlowConsumer(f"the client took nothing for {self._client_timeout_s:g} s") from None
        finally:
            limit.stop()

    async def Complete(self, request: router_pb2.CompleteRequest, context: Context) -> router_pb2.CompleteResponse:
        check_choices(request.request.n)
        ask = _ask(request.request, context)
        spelling = _Spelling(self._service, ask, echo=request.request.echo)
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
        prompt = _chat(request.chat) if request.WhichOneof("input") == "chat" else Text(request.text)
        return router_pb2.TokenizeResponse(token_ids=await self._service.encode(prompt, request.model))

    async def Detokenize(
        self, request: router_pb2.DetokenizeRequest, context: Context
    ) -> router_pb2.DetokenizeResponse:
        return router_pb2.DetokenizeResponse(text=self._service.decode(tuple(request.token_ids), request.model))

    async def ListModels(
        self, request: router_pb2.ListModelsRequest, context: Context
    ) -> router_pb2.ListModelsResponse:
        return router_pb2.ListModelsResponse(
            models=[
                router_pb2.ModelInfo(
                    name=model.key.name,
                    digest=model.key.digest,
                    max_context_length=model.max_context,
                    engine_count=len(model.members),
                )
                for model in self._service.models()
            ]
        )


class _Spelling:
    """Answers to one request on the wire."""

    def __init__(self, service: GenerationService, ask: Ask, *, echo: bool) -> None:
        self._service, self._ask = service, ask
        self._wants_echo = echo

    def pieces(self, choice: int, answer: Answer) -> tuple[router_pb2.GenerateResponse, ...]:
        """The next message, or several where one cannot hold all that is told of the prompt."""
        message = self._message(choice, answer)
        return (message,) if answer.prompt_logprobs is None else tuple(_telling(message, answer.prompt_logprobs))

    def _message(self, choice: int, answer: Answer) -> router_pb2.GenerateResponse:
        """The first of choice 0 has the prompt where it is wished for."""
        message = _to_wire(choice, answer)
        if self._wants_echo and not choice:
            message.prompt.text = self._service.echo(self._ask, answer.prompt_ids)
            message.prompt.token_ids.extend(answer.prompt_ids)
            self._wants_echo = False
        return message


def _ask(request: router_pb2.GenerateRequest, context: Context) -> Ask:
    is_seeded = request.seed_given or request.sampling.seed != 0
    said = {key: str(value) for key, value in context.invocation_metadata() or ()}
    return Ask(
        prompt=_prompt(request),
        sampling=sampling_from_wire(request.sampling, request.sampling.seed if is_seeded else new_seed()),
        stop=tuple(request.stop),
        include_stop=request.include_stop,
        model=request.model,
        cache_salt=request.cache_salt,
        request_id=request.request_id,
        policy=said.get(POLICY_METADATA, ""),
        priority=said.get(PRIORITY_METADATA, ""),
        tenant=said.get(TENANT_METADATA, ""),
        time_left_s=time_left(context),
        prompt_only=request.prompt_only,
    )


def _prompt(request: router_pb2.GenerateRequest) -> Prompt:
    match request.WhichOneof("prompt"):
        case "text":
            return Text(request.text)
        case "chat":
            return _chat(request.chat)
        case "tokens":
            return Tokens(tuple(request.tokens.ids))
    raise EmptyPrompt("the request has no prompt")


def _chat(chat: router_pb2.ChatMessages) -> Chat:
    return Chat(tuple(ChatMessage(message.role, message.content) for message in chat.messages))


def _to_wire(choice: int, answer: Answer) -> router_pb2.GenerateResponse:
    message = router_pb2.GenerateResponse(
        text=answer.text,
        token_ids=answer.token_ids,
        request_id=answer.request_id,
        policy=answer.policy,
        choice=choice,
    )
    if answer.logprobs:
        message.logprobs.extend(map(logprobs_to_wire, answer.logprobs))
    if answer.finish is not None:
        message.finish_reason = finish_to_wire(answer.finish)
        message.legs.extend(map(leg_to_wire, answer.legs))
    if answer.usage is not None:
        message.usage.prompt_token_count = answer.usage.prompt_tokens
        message.usage.cached_token_count = answer.usage.cached_tokens
        message.usage.output_token_count = answer.usage.output_tokens
    return message


def _telling(message: router_pb2.GenerateResponse, prompt: PromptLogprobs) -> Iterator[router_pb2.GenerateResponse]:
    """`message` with the last that is told of its prompt, and before it what comes before that."""
    *parts, last = prompt.split(MAX_PROMPT_NUMBERS)
    for part in parts:
        yield router_pb2.GenerateResponse(
            request_id=message.request_id,
            policy=message.policy,
            prompt=message.prompt if message.HasField("prompt") else None,
            prompt_logprobs=prompt_to_wire(part),
        )
        for field in ("request_id", "policy", "prompt"):
            message.ClearField(field)
    message.prompt_logprobs.CopyFrom(prompt_to_wire(last))
    yield message
