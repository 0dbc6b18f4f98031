"""Why an engine refuses or gives up a request.

    EngineError
    ├── BadRequest, EmptyPrompt, TokenOutOfRange, PromptTooLong, BadSampling    the request can never be served
    ├── InvalidGuide, GuidesUnavailable                                         its output cannot be guided so, or here
    ├── QueueFull, NoPages                                                      no room now: retry after the delay
    ├── NoKvTransfer, TransferServiceGone                                       no way to receive or send KV
    ├── SequenceExists                                                          a StartGenerate of that id is live
    ├── EngineDraining, EngineStopped, StepFailed                               the engine's own condition
    └── RequestCancelled, DeadlineExceeded                                      the caller's own wish

The gRPC side may use these leaves for what it refuses by itself.
"""

from __future__ import annotations

from services.protocol.errors import Code, ServiceError


class EngineError(ServiceError):
    """An engine's answer to a request that it does not carry out."""


class BadRequest(EngineError):
    """An argument makes no sense: a count, a lease, a begin without a reservation."""

    code = Code.INVALID_ARGUMENT
    reason = "BAD_REQUEST"


class EmptyPrompt(EngineError):
    """The prompt has no token."""

    code = Code.INVALID_ARGUMENT
    reason = "EMPTY_PROMPT"


class TokenOutOfRange(EngineError):
    """A token id is not in the model's vocabulary."""

    code = Code.INVALID_ARGUMENT
    reason = "TOKEN_OUT_OF_RANGE"


class PromptTooLong(EngineError):
    """The prompt, with the output it must leave room for, could never fit into this engine."""

    code = Code.INVALID_ARGUMENT
    reason = "PROMPT_TOO_LONG"


class BadSampling(EngineError):
    """A sampling value is out of range or not a number."""

    code = Code.INVALID_ARGUMENT
    reason = "INVALID_SAMPLING"


class InvalidGuide(EngineError):
    """A guide is not in its language, too complex to follow, or does not fit what was generated already."""

    code = Code.INVALID_ARGUMENT
    reason = "INVALID_GUIDE"


class GuidesUnavailable(EngineError):
    """This engine cannot guide its output: its tokenizer is not one that guides work with."""

    code = Code.FAILED_PRECONDITION
    reason = "GUIDES_UNAVAILABLE"


class QueueFull(EngineError):
    """As many requests wait already as the engine lets wait, or are open as a session may have."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "QUEUE_FULL"


class NoPages(EngineError):
    """Too few KV pages are free, or a reservation would take those that one longest prompt needs."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "NO_PAGES"


class NoKvTransfer(EngineError):
    """The engine runs without a KV transfer service, so it can neither receive nor send KV."""

    code = Code.FAILED_PRECONDITION
    reason = "NO_KVTRANSFER"


class TransferServiceGone(EngineError):
    """The KV transfer service of this engine's node died, or did not do what it was asked; it may come back."""

    code = Code.UNAVAILABLE
    reason = "KVTRANSFER_GONE"


class SequenceExists(EngineError):
    """The request id names a sequence that is still alive."""

    code = Code.ALREADY_EXISTS
    reason = "SEQUENCE_EXISTS"


class EngineDraining(EngineError):
    """The engine is shutting down and takes no new work."""

    code = Code.UNAVAILABLE
    reason = "DRAINING"


class EngineStopped(EngineError):
    """The engine's loop has failed or ended; this process serves no more."""

    code = Code.UNAVAILABLE
    reason = "ENGINE_STOPPED"


class StepFailed(EngineError):
    """Computing a step, or taking in a command, failed inside the engine."""

    code = Code.INTERNAL
    reason = "STEP_FAILED"


class RequestCancelled(EngineError):
    """The caller cancelled or aborted the request."""

    code = Code.CANCELLED
    reason = "REQUEST_CANCELLED"


class DeadlineExceeded(EngineError):
    """The request's time was up before it ended."""

    code = Code.DEADLINE_EXCEEDED
    reason = "DEADLINE_EXCEEDED"
