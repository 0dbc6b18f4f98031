"""The root of every error that crosses a service boundary.

Each service has one module `errors.py` with its own leaves. A leaf fixes the canonical status code and the reason;
an instance adds a sentence and, where waiting helps, a delay. The gRPC plumbing turns it into google.rpc.Status
with ErrorInfo and RetryInfo, and back. docs/errors.md lists every leaf; a test holds the two equal.

    ServiceError
    ├── ProtocolError              reservations, grants, attempts (this package)
    ├── EngineError                services/engine/errors.py
    ├── KvTransferError            services/kvtransfer/errors.py
    └── RouterError                services/router/errors.py
"""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar


class Code(IntEnum):
    """google.rpc.Code, without a dependency on grpc."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class ServiceError(Exception):
    """An error with a status code, a reason for programs and a sentence for people.

    `retry_delay_s` is advice in seconds, None where waiting does not help.
    """

    code: ClassVar[Code] = Code.INTERNAL
    reason: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, *, retry_delay_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_delay_s = retry_delay_s


class ProtocolError(ServiceError):
    """A rule of docs/design.md was broken or a race was lost."""


class InvalidRange(ProtocolError):
    """A token range is not 0 <= begin <= end, or does not fit the prompt."""

    code = Code.INVALID_ARGUMENT
    reason = "INVALID_RANGE"


class RequestIdReused(ProtocolError):
    """The same request id came again with other arguments."""

    code = Code.INVALID_ARGUMENT
    reason = "REQUEST_ID_REUSED"


class UnknownReservation(ProtocolError):
    """No reservation of that id is known, or it ended too long ago to be remembered."""

    code = Code.NOT_FOUND
    reason = "UNKNOWN_RESERVATION"


class WrongSecret(ProtocolError):
    """The caller did not prove the right to the reservation."""

    code = Code.PERMISSION_DENIED
    reason = "WRONG_SECRET"


class ReservationGone(ProtocolError):
    """The reservation expired, was released, aborted or used up."""

    code = Code.ABORTED
    reason = "RESERVATION_GONE"


class StaleEpoch(ProtocolError):
    """The address or call names an earlier incarnation of the transfer service."""

    code = Code.FAILED_PRECONDITION
    reason = "STALE_EPOCH"


class StaleIncarnation(ProtocolError):
    """The caller is not the pool's present engine."""

    code = Code.FAILED_PRECONDITION
    reason = "STALE_INCARNATION"


class OutsideWindow(ProtocolError):
    """A write goes beyond the window that was granted."""

    code = Code.OUT_OF_RANGE
    reason = "OUTSIDE_WINDOW"


class RangeOverlaps(ProtocolError):
    """An attempt overlaps another live attempt or a committed range without being equal to it."""

    code = Code.FAILED_PRECONDITION
    reason = "RANGE_OVERLAPS"


class GrantConflict(ProtocolError):
    """A grant contradicts another one that is open."""

    code = Code.INVALID_ARGUMENT
    reason = "GRANT_CONFLICT"


class AttemptSuperseded(ProtocolError):
    """A later attempt at the same range has taken over, or the number was used before."""

    code = Code.ABORTED
    reason = "ATTEMPT_SUPERSEDED"


class ModelMismatch(ProtocolError):
    """Sender and receiver hold different weights, dtypes or rope parameters."""

    code = Code.FAILED_PRECONDITION
    reason = "MODEL_MISMATCH"


class PromptMismatch(ProtocolError):
    """Sender and receiver were given different prompts or salts."""

    code = Code.FAILED_PRECONDITION
    reason = "PROMPT_MISMATCH"


class LayoutMismatch(ProtocolError):
    """Pages of sender and receiver cannot be converted into one another."""

    code = Code.FAILED_PRECONDITION
    reason = "LAYOUT_MISMATCH"
