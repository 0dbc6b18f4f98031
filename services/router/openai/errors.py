"""Errors as OpenAI's API shows them: {"error": {"message", "type", "param", "code"}} under an HTTP status."""

from __future__ import annotations

import asyncio
import math

from services.protocol.errors import Code, ServiceError
from services.rpc.interceptor import internal_error

_STATUSES = {
    Code.CANCELLED: 499,
    Code.INVALID_ARGUMENT: 400,
    Code.DEADLINE_EXCEEDED: 504,
    Code.NOT_FOUND: 404,
    Code.ALREADY_EXISTS: 409,
    Code.PERMISSION_DENIED: 403,
    Code.RESOURCE_EXHAUSTED: 429,
    Code.FAILED_PRECONDITION: 400,
    Code.OUT_OF_RANGE: 400,
    Code.UNIMPLEMENTED: 501,
    Code.UNAVAILABLE: 503,
    Code.UNAUTHENTICATED: 401,
}
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
# Names that OpenAI's clients know; all others are our own reasons in lower case.
_CODES = {"UNKNOWN_MODEL": "model_not_found", "PROMPT_TOO_LONG": "context_length_exceeded"}
_RETRY_STATUSES = (429, 503)
_DEFAULT_RETRY_S = 1.0


class Refusal(Exception):
    """An answer that is an error. `param` names the member of the body that is at fault, `allow` the methods that a
    path has."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        param: str | None = None,
        retry_delay_s: float | None = None,
        allow: str = "",
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_delay_s, self.allow = retry_delay_s, allow

    def body(self) -> dict[str, dict[str, str | None]]:
        """In OpenAI's shape."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Retry-After, in whole seconds, where waiting helps; what is missing or wrong of key and method."""
        if self.allow:
            return {"allow": self.allow}
        if self.status == 401:
            return {"www-authenticate": "Bearer"}
        if self.status not in _RETRY_STATUSES:
            return {}
        delay_s = _DEFAULT_RETRY_S if self.retry_delay_s is None else self.retry_delay_s
        return {"retry-after": str(max(1, math.ceil(delay_s)))}


_CUT_OFF = Refusal(503, "the server stopped before the answer was whole", "draining")


def refusal(error: ServiceError) -> Refusal:
    """The same error over HTTP; codes that stand for a failure of ours become 500."""
    code = _CODES.get(error.reason, error.reason.lower())
    return Refusal(_STATUSES.get(error.code, 500), error.message, code, retry_delay_s=error.retry_delay_s)


def bug(error: BaseException, path: str) -> Refusal:
    """Of a bug the client is told only a name to look for in the log."""
    return refusal(internal_error(path, error))


def cut_off(error: asyncio.CancelledError, path: str) -> Refusal:
    """For a call that was cancelled, and not by its client: it outlived the grace of a router that stops, or, which
    nobody asked for, somebody cancelled a task that it was waiting for."""
    task = asyncio.current_task()
    return _CUT_OFF if task is not None and task.cancelling() else bug(error, path)


def bad_value(param: str, message: str) -> Refusal:
    """A member of the body has a value that cannot be taken."""
    return Refusal(400, f"{param}: {message}", "invalid_value", param=param)


def unsupported(param: str, message: str = "is not supported by this server") -> Refusal:
    """A member of the body asks for something that OpenAI's API has and this server does not."""
    return Refusal(400, f"{param} {message}", "unsupported_parameter", param=param)
