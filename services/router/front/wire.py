"""Requests for text and answers to them, to and from messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from microserve.router.v1 import router_pb2

from services.protocol.errors import ServiceError
from services.router.answer import Answer
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
    """How a request is to be served, beside what it asks for. Empty: as Ask has it."""

    policy: str = ""
    priority: str = ""
    tenant: str = ""
    time_left_s: float | None = None


class Spelling:
    """Answers to one request on the wire."""

    def __init__(self, service: GenerationService, ask: Ask, *, echo: bool) -> None:
        self._service, self._ask = service, ask
        self._wants_echo = echo

    def write(
        self, message: router_pb2.GenerateResponse, choice: int, answer: Answer
    ) -> Sequence[router_pb2.GenerateResponse]:
        """Makes an empty message the next one. Gives those that come before it, where one cannot hold all that is told
        of the prompt."""
        message.text = answer.text
        message.token_ids.extend(answer.token_ids)
        if choice:
            message.choice = choice
        if answer.logprobs:
            message.logprobs.extend(map(logprobs_to_wire, answer.logprobs))
        if answer.finish is not None:
            message.finish_reason = finish_to_wire(answer.finish)
            message.legs.extend(map(leg_to_wire, answer.legs))
        if answer.usage is not None:
            message.usage.prompt_token_count = answer.usage.prompt_tokens
            message.usage.cached_token_count = answer.usage.cached_tokens
            message.usage.output_token_count = answer.usage.output_tokens
        return self._begin(message, choice, answer) if answer.program is not None else ()

    def pieces(self, choice: int, answer: Answer) -> list[router_pb2.GenerateResponse]:
        """The next message, after those that come before it."""
        message = router_pb2.GenerateResponse()
        return [*self.write(message, choice, answer), message]

    def _begin(
        self, message: router_pb2.GenerateResponse, choice: int, answer: Answer
    ) -> Sequence[router_pb2.GenerateResponse]:
        """What the first message has beside others; that of choice 0 has the prompt where it is wished for."""
        assert answer.program is not None
        message.request_id, message.policy = answer.request_id, answer.program.spec
        if self._wants_echo and not choice:
            message.prompt.text = self._service.echo(self._ask, answer.prompt_ids)
            message.prompt.token_ids.extend(answer.prompt_ids)
        return () if answer.prompt_logprobs is None else _tell(message, answer.prompt_logprobs)


def ask_of(request: router_pb2.GenerateRequest, terms: Terms, owner: str) -> Ask:
    """`owner` is the tenant whose key the client shows, empty: no tenant's. EmptyPrompt, WrongTenant."""
    is_seeded = request.seed_given or request.sampling.seed != 0
    return Ask(
        prompt=_prompt(request),
        sampling=sampling_from_wire(request.sampling, request.sampling.seed if is_seeded else new_seed()),
        stop=tuple(request.stop[:]),
        include_stop=request.include_stop,
        model=request.model,
        cache_salt=request.cache_salt,
        request_id=request.request_id,
        policy=terms.policy,
        priority=terms.priority,
        tenant=tenant_of(owner, terms.tenant),
        owner=owner,
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
            return Tokens(tuple(request.tokens.ids[:]))  # a slice: see router/wire.py
    raise EmptyPrompt("the request has no prompt")


def chat_of(chat: router_pb2.ChatMessages) -> Chat:
    """A conversation."""
    return Chat(tuple(ChatMessage(message.role, message.content) for message in chat.messages))


def _tell(message: router_pb2.GenerateResponse, prompt: PromptLogprobs) -> Sequence[router_pb2.GenerateResponse]:
    """Puts the last that is told of its prompt into the first message. Gives those that then come before it."""
    *parts, last = prompt.split(MAX_PROMPT_NUMBERS)
    message.prompt_logprobs.CopyFrom(prompt_to_wire(last))
    if not parts:
        return ()
    before = [router_pb2.GenerateResponse(prompt_logprobs=prompt_to_wire(part)) for part in parts]
    before[0].request_id, before[0].policy = message.request_id, message.policy
    if message.HasField("prompt"):
        before[0].prompt.CopyFrom(message.prompt)
    for field in ("request_id", "policy", "prompt"):
        message.ClearField(field)
    return before
