"""What clients ask for, and the bounds that are checked before an engine is bothered."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from services.router.admission.ticket import Priority
from services.router.errors import EmptyPrompt, InvalidRequest, PromptTooLong
from services.router.fleet.registry import Model
from services.router.programs.program import BoundProgram
from services.router.text.template import ChatMessage
from services.router.values import Sampling

MAX_NAME_CHARACTERS = 128
MAX_POLICY_CHARACTERS = 512  # parameters included
MAX_STOPS, MAX_STOP_CHARACTERS = 16, 256
_PRIORITIES = tuple(each.value for each in Priority)
MAX_MESSAGES = 4_096
MAX_CHOICES = 128
MAX_DETOKENIZED = 1 << 17
MAX_STOP_TOKEN_IDS, MAX_LOGIT_BIASES, MAX_LOGPROBS = 1_024, 4_096, 20
MAX_GUIDE_BYTES = 32 * 1024  # of types.v1.Guide


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text; special tokens in it are text."""

    text: str


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, which the model's chat template turns into a prompt."""

    messages: tuple[ChatMessage, ...]


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids, taken as they are."""

    ids: tuple[int, ...]


Prompt = Text | Chat | Tokens


@dataclass(frozen=True, slots=True)
class Beside:
    """Another answer to the same prompt: its program, and the name of the engine where it left the prompt's pages."""

    program: BoundProgram
    engine: str


@dataclass(frozen=True, slots=True)
class Ask:
    """One request for text."""

    prompt: Prompt
    sampling: Sampling = field(default_factory=Sampling)  # with a seed: the client's, or a new one
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    model: str = ""
    cache_salt: str = ""
    request_id: str = ""
    policy: str = ""  # name, with parameters after a colon; empty: the current one
    time_left_s: float | None = None  # of the client's deadline
    priority: str = ""  # of admission.ticket.Priority; empty: normal
    tenant: str = ""  # who shares the fleet fairly with the others
    owner: str = ""  # the tenant whose key was shown; empty: no tenant's
    choice: int = 0  # which of all answers that are asked for at once, as their client counts them
    has_entered: bool = False  # counted already, with all that is asked for at once
    prompt_only: bool = False  # the answer ends before its first token
    beside: Beside | None = None  # an answer to the same prompt that has begun; None: there is none

    @property
    def name(self) -> str:
        """What logs and traces call it: of answers asked for at once each has a name of its own. Empty: nobody named
        it."""
        if not self.choice:
            return self.request_id
        suffix = f"#{self.choice}"
        return self.request_id[: MAX_NAME_CHARACTERS - len(suffix)] + suffix


def new_seed() -> int:
    """For a client that gave none: engines are deterministic, and so are replays."""
    return random.getrandbits(63)


def check(ask: Ask) -> None:
    """EmptyPrompt, InvalidRequest."""
    check_prompt(ask.prompt)
    # What a request leaves out, as most do with most of it, is in order.
    if ask.request_id:
        _check_name("request_id", ask.request_id)
    if ask.cache_salt:
        _check_name("cache_salt", ask.cache_salt)
    if ask.tenant:
        _check_name("tenant", ask.tenant)
    if ask.policy:
        _check_name("policy", ask.policy, MAX_POLICY_CHARACTERS)
    if ask.priority and ask.priority not in _PRIORITIES:
        raise InvalidRequest(f"priority {ask.priority[:MAX_NAME_CHARACTERS]!r} is not one of {', '.join(_PRIORITIES)}")
    if ask.stop:
        _check_stops(ask.stop)
    sampling = ask.sampling
    if sampling.stop_token_ids:
        _bounded("stop_token_ids", len(sampling.stop_token_ids), MAX_STOP_TOKEN_IDS, "ids")
    if sampling.logit_bias:
        _bounded("logit_bias", len(sampling.logit_bias), MAX_LOGIT_BIASES, "entries")
    if sampling.logprobs:
        _bounded("logprobs", sampling.logprobs, MAX_LOGPROBS, "alternatives")
    if sampling.prompt_logprobs:
        _bounded("prompt_logprobs", sampling.prompt_logprobs, MAX_LOGPROBS, "alternatives")
    if sampling.guide is not None:
        _bounded("guide", sum(len(text.encode()) for text in sampling.guide.texts), MAX_GUIDE_BYTES, "bytes")


def _check_stops(stops: tuple[str, ...]) -> None:
    _bounded("stop", len(stops), MAX_STOPS, "strings")
    for stop in stops:
        _bounded("a stop string", len(stop), MAX_STOP_CHARACTERS, "characters")
        if not stop:
            raise InvalidRequest("a stop string is empty")


def check_choices(n: int) -> None:
    """InvalidRequest for more answers to one prompt than are given."""
    _bounded("n", n, MAX_CHOICES, "choices")


def check_prompt(prompt: Prompt) -> None:
    """EmptyPrompt, InvalidRequest."""
    match prompt:
        case Text(""):
            raise EmptyPrompt("the prompt has no text")
        case Tokens(()):
            raise EmptyPrompt("the prompt has no tokens")
        case Chat(()):
            raise EmptyPrompt("the conversation has no message")
        case Chat(messages):
            _bounded("chat", len(messages), MAX_MESSAGES, "messages")
            for message in messages:
                _check_name("a role", message.role)
                if not message.role:
                    raise InvalidRequest("a message has no role")


def check_tokens(token_ids: tuple[int, ...], model: Model) -> None:
    """Of a prompt. EmptyPrompt, InvalidRequest, PromptTooLong."""
    if not token_ids:
        raise EmptyPrompt("the prompt has no tokens")
    if max(token_ids) >= model.vocab_size:
        raise _not_in_vocabulary(token_ids, model)
    if len(token_ids) >= model.max_context:
        raise PromptTooLong(
            f"a prompt of {len(token_ids)} tokens leaves no room for an answer in a context of {model.max_context}"
        )


def check_detokenized(token_ids: tuple[int, ...], model: Model) -> None:
    """InvalidRequest for ids that are not the model's, or so many that the event loop would stand still."""
    _bounded("token_ids", len(token_ids), max(MAX_DETOKENIZED, model.max_context), "ids")
    if max(token_ids, default=0) >= model.vocab_size:
        raise _not_in_vocabulary(token_ids, model)


def _not_in_vocabulary(token_ids: tuple[int, ...], model: Model) -> InvalidRequest:
    return InvalidRequest(f"token id {max(token_ids)} is not below {model.vocab_size}")


def _check_name(what: str, name: str, limit: int = MAX_NAME_CHARACTERS) -> None:
    _bounded(what, len(name), limit, "characters")
    if not name.isprintable():  # it goes into logs
        raise InvalidRequest(f"{what} has characters that cannot be printed")


def _bounded(what: str, number: int, limit: int, unit: str) -> None:
    if number > limit:
        raise InvalidRequest(f"{what} has {number} {unit}, more than {limit}")
