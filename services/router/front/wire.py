"""Requests for text and answers to them, to and from messages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from microserve.router.v1 import router_pb2

from services.protocol.errors import ServiceError
from services.router.answering import Answer
from services.router.asking import Ask, Chat, Prompt, Text, Tokens, new_seed
from services.router.errors import EmptyPrompt
from services.router.keys import tenant_of
from services.router.prompt_logprobs import PromptLogprobs
from services.router.service import GenerationService
from services.router.text.template import ChatMessage
from services.router.wire import finish_to_wire, leg_to_wire, logprobs_to_wire, prompt_to_wire, sampling_from_wire
from services.rpc.status import to_error_message

# Of a prompt in one message: at about five bytes each, an eighth of what a message may hold.
MAX_PROMPT_NUMBERS = 100_000


@dataclass(frozen=True, slots=True)
class Terms:
    """How a request is to be served, beside what it asks for. Empty: as Ask has it. `owner`: the tenant whose key the
    client has shown."""

    policy: str = ""
    priority: str = ""
    tenant: str = ""
    time_left_s: float | None = None
    owner: str = ""


class Spelling:
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


def ask_of(request: router_pb2.GenerateRequest, terms: Terms) -> Ask:
    """EmptyPrompt, WrongTenant."""
    is_seeded = request.seed_given or request.sampling.seed != 0
    return Ask(
        prompt=_prompt(request),
        sampling=sampling_from_wire(request.sampling, request.sampling.seed if is_seeded else new_seed()),
        stop=tuple(request.stop),
        include_stop=request.include_stop,
        model=request.model,
        cache_salt=request.cache_salt,
        request_id=request.request_id,
        policy=terms.policy,
        priority=terms.priority,
        tenant=tenant_of(terms.owner, terms.tenant),
        time_left_s=terms.time_left_s,
        prompt_only=request.prompt_only,
    )


def failed(call_id: int, error: ServiceError) -> router_pb2.SessionOutput:
    """The last output of a request that failed."""
    return router_pb2.SessionOutput(call_id=call_id, error=to_error_message(error), last=True)


def _prompt(request: router_pb2.GenerateRequest) -> Prompt:
    match request.WhichOneof("prompt"):
        case "text":
            return Text(request.text)
        case "chat":
            return chat_of(request.chat)
        case "tokens":
            return Tokens(tuple(request.tokens.ids))
    raise EmptyPrompt("the request has no prompt")


def chat_of(chat: router_pb2.ChatMessages) -> Chat:
    """A conversation."""
    return Chat(tuple(ChatMessage(message.role, message.content) for message in chat.messages))


def _to_wire(choice: int, answer: Answer) -> router_pb2.GenerateResponse:
    message = router_pb2.GenerateResponse(
        text=answer.text,
        token_ids=answer.token_ids,
        request_id=answer.request_id,
        policy=answer.program.spec if answer.program is not None else "",
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
