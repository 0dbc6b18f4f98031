"""What the router refuses or fails with. Errors of engines pass through with their own code and reason.

RouterError
├── NoEngine               UNAVAILABLE          no healthy engine (of that model)
├── EngineDrained          UNAVAILABLE          an operator empties the engine under a sequence
├── EngineLost             UNAVAILABLE          an engine went away under a verb
├── BreakerOpen            UNAVAILABLE          an engine failed too often and is left alone for a while
├── UnknownEngine          NOT_FOUND            no engine of the fleet has that address
├── FleetFull              RESOURCE_EXHAUSTED   more engines than a fleet may have
├── RegistrationDisabled   PERMISSION_DENIED    engines do not join this router by themselves
├── NotAuthenticated       UNAUTHENTICATED      an engine did not prove that it may join
├── WrongKey               UNAUTHENTICATED      a client showed no valid API key
├── WrongTenant            PERMISSION_DENIED    a client names another tenant than its key does
├── UnknownModel           NOT_FOUND
├── ModelRequired          INVALID_ARGUMENT     several models, and none was named
├── UnknownPolicy          NOT_FOUND
├── UnknownRequest         NOT_FOUND
├── BadPolicy              INVALID_ARGUMENT     a program cannot be loaded, or its parameters are wrong
├── NoEarlierPolicy        FAILED_PRECONDITION  there is no policy to go back to
├── UploadDisabled         PERMISSION_DENIED
├── PolicyFailed           ABORTED              a program raised, yielded nothing or yielded nonsense
├── Refused                INVALID_ARGUMENT     a program serves no such request, and says why
├── PolicyTimeout          DEADLINE_EXCEEDED    a program yielded nothing for too long
├── RequestTimeout         DEADLINE_EXCEEDED    the request's own time is over
├── NoPair                 FAILED_PRECONDITION  there are no two engines to disaggregate over
├── EmptyPrompt            INVALID_ARGUMENT
├── PromptTooLong          INVALID_ARGUMENT
├── InvalidRequest         INVALID_ARGUMENT     a field is out of its bounds, or all of it too large
├── ChatTemplateFailed     INVALID_ARGUMENT     the model's template refuses the conversation
├── NoChatTemplate         FAILED_PRECONDITION
├── BadTokenizer           FAILED_PRECONDITION  an engine's tokenizer cannot be used
├── IncompatibleEngine     FAILED_PRECONDITION  an engine speaks another contract
├── Overloaded             RESOURCE_EXHAUSTED   the request cannot begin in time
├── TooManySessions      RESOURCE_EXHAUSTED   as many sessions are open as one client, or all, may have
├── RequestCancelled       CANCELLED            the client ended a request of a session
├── Draining               UNAVAILABLE          the router is about to stop
└── SlowConsumer           RESOURCE_EXHAUSTED   a client reads too slowly for the room there is
"""

from __future__ import annotations

from services.protocol.errors import Code, ServiceError

MAX_REFUSAL_CHARACTERS = 500


class RouterError(ServiceError):
    """The router itself refuses or fails."""


class NoEngine(RouterError):
    """No healthy engine serves the model now."""

    code = Code.UNAVAILABLE
    reason = "NO_ENGINE"


class EngineDrained(RouterError):
    """An operator empties the engine at `address`: the sequence goes on elsewhere."""

    code = Code.UNAVAILABLE
    reason = "ENGINE_DRAINED"

    def __init__(self, address: str) -> None:
        super().__init__(f"an operator empties the engine at {address}", retry_delay_s=1.0)
        self.address = address


class EngineLost(RouterError):
    """The engine ended its session while a verb was under way on it."""

    code = Code.UNAVAILABLE
    reason = "ENGINE_LOST"


class BreakerOpen(RouterError):
    """The engine failed so often in a row that it is left alone for a while."""

    code = Code.UNAVAILABLE
    reason = "BREAKER_OPEN"


class UnknownEngine(RouterError):
    """No engine of the fleet has that address."""

    code = Code.NOT_FOUND
    reason = "UNKNOWN_ENGINE"


class FleetFull(RouterError):
    """More engines are named than a fleet may have."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "FLEET_FULL"


class RegistrationDisabled(RouterError):
    """Engines cannot join this router by themselves."""

    code = Code.PERMISSION_DENIED
    reason = "REGISTRATION_DISABLED"


class NotAuthenticated(RouterError):
    """Whoever wants to join the fleet has not proved that it may."""

    code = Code.UNAUTHENTICATED
    reason = "NOT_AUTHENTICATED"


class WrongKey(RouterError):
    """The client showed no API key, or none that this router knows."""

    code = Code.UNAUTHENTICATED
    reason = "INVALID_API_KEY"


class WrongTenant(RouterError):
    """The client's key is a tenant's, and the request names another one."""

    code = Code.PERMISSION_DENIED
    reason = "WRONG_TENANT"


class UnknownModel(RouterError):
    """No engine, healthy or not, has ever said that it serves the model."""

    code = Code.NOT_FOUND
    reason = "UNKNOWN_MODEL"


class ModelRequired(RouterError):
    """The fleet serves several models and the request names none."""

    code = Code.INVALID_ARGUMENT
    reason = "MODEL_REQUIRED"


class UnknownPolicy(RouterError):
    """No program of that name is at hand."""

    code = Code.NOT_FOUND
    reason = "UNKNOWN_POLICY"


class UnknownRequest(RouterError):
    """No trace of that request is kept (any more)."""

    code = Code.NOT_FOUND
    reason = "UNKNOWN_REQUEST"


class BadPolicy(RouterError):
    """A program cannot be loaded, or its parameters do not fit."""

    code = Code.INVALID_ARGUMENT
    reason = "BAD_POLICY"


class NoEarlierPolicy(RouterError):
    """The policy in use is the first one."""

    code = Code.FAILED_PRECONDITION
    reason = "NO_EARLIER_POLICY"


class UploadDisabled(RouterError):
    """This router takes no code over the network."""

    code = Code.PERMISSION_DENIED
    reason = "UPLOAD_DISABLED"


class PolicyFailed(RouterError):
    """The program raised, produced nothing, stopped early or yielded something that is no chunk."""

    code = Code.ABORTED
    reason = "POLICY_FAILED"


class Refused(RouterError):
    """The program serves no such request; the message is the program's, cut to MAX_REFUSAL_CHARACTERS on one line."""

    code = Code.INVALID_ARGUMENT
    reason = "REFUSED_BY_POLICY"

    def __init__(self, message: str) -> None:
        shown = "".join(each if each.isprintable() else " " for each in str(message)[:MAX_REFUSAL_CHARACTERS])
        super().__init__(" ".join(shown.split()) or "the policy refuses this request")


class PolicyTimeout(RouterError):
    """The program yielded nothing for longer than the router allows."""

    code = Code.DEADLINE_EXCEEDED
    reason = "POLICY_TIMEOUT"


class RequestTimeout(RouterError):
    """The client's deadline, or the router's own limit for a request, has passed."""

    code = Code.DEADLINE_EXCEEDED
    reason = "DEADLINE_EXCEEDED"


class NoPair(RouterError):
    """No two engines can hand KV to each other; `cause` says why, in one word. The policy host answers it by serving
    the request data parallel."""

    code = Code.FAILED_PRECONDITION
    reason = "NO_PAIR"

    def __init__(self, message: str, *, cause: str) -> None:
        super().__init__(message)
        self.cause = cause


class EmptyPrompt(RouterError):
    """The prompt has no text, no message or no token."""

    code = Code.INVALID_ARGUMENT
    reason = "EMPTY_PROMPT"


class PromptTooLong(RouterError):
    """The prompt leaves no room for one generated token in the model's context."""

    code = Code.INVALID_ARGUMENT
    reason = "PROMPT_TOO_LONG"


class InvalidRequest(RouterError):
    """A field of a request is out of its bounds, or all of it too large for an engine; the message says which."""

    code = Code.INVALID_ARGUMENT
    reason = "INVALID_REQUEST"


class ChatTemplateFailed(RouterError):
    """The model's chat template does not accept the conversation."""

    code = Code.INVALID_ARGUMENT
    reason = "CHAT_TEMPLATE_FAILED"


class NoChatTemplate(RouterError):
    """The model has no chat template, so it takes text and token ids only."""

    code = Code.FAILED_PRECONDITION
    reason = "NO_CHAT_TEMPLATE"


class BadTokenizer(RouterError):
    """The tokenizer that an engine handed out is damaged, too large or of an unknown kind."""

    code = Code.FAILED_PRECONDITION
    reason = "BAD_TOKENIZER"


class IncompatibleEngine(RouterError):
    """The engine speaks another major version of the contract."""

    code = Code.FAILED_PRECONDITION
    reason = "INCOMPATIBLE_ENGINE"


class Overloaded(RouterError):
    """The request cannot begin in time: as many as the fleet takes run, and as many as may wait do."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "OVERLOADED"


class TooManySessions(RouterError):
    """As many sessions are open as one client, or all of them together, may have."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "TOO_MANY_SESSIONS"


class RequestCancelled(RouterError):
    """The client cancelled a request of its session."""

    code = Code.CANCELLED
    reason = "REQUEST_CANCELLED"


class Draining(RouterError):
    """The router is about to stop and takes no new requests on sessions."""

    code = Code.UNAVAILABLE
    reason = "DRAINING"


class SlowConsumer(RouterError):
    """More output waits for the reader than the router keeps."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "SLOW_CONSUMER"
