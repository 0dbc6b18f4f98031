"""Errors on the wire: ServiceError to google.rpc.Status and to types.v1.Error, and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import grpc.aio
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from microserve.types.v1 import error_pb2

from services.protocol.errors import Code, ServiceError

DOMAIN = "microserve"
DETAILS_KEY = "grpc-status-details-bin"
# Statuses travel as HTTP/2 trailers, of which a peer takes 8 KiB in all.
MAX_MESSAGE_BYTES = 1_000


def _cut(message: str) -> str:
    """At most MAX_MESSAGE_BYTES: the trailers hold it twice, once percent-encoded, three bytes for one. Lone
    surrogates, as names of files may have, become question marks."""
    return message.encode(errors="replace")[:MAX_MESSAGE_BYTES].decode(errors="ignore")


_GRPC_CODES: dict[int, grpc.StatusCode] = {int(code.value[0]): code for code in grpc.StatusCode}


class RemoteError(ServiceError):
    """What a peer answered. Code and reason are the peer's, so they belong to the instance."""

    def __init__(self, code: Code, reason: str, message: str, *, retry_delay_s: float | None = None) -> None:
        super().__init__(message, retry_delay_s=retry_delay_s)
        # The leaves of ServiceError fix both as class variables; only here do they differ by instance.
        self.__dict__.update(code=code, reason=reason)

    def __reduce__(self) -> tuple[object, ...]:
        return (_remake, (self.code, self.reason, self.message, self.retry_delay_s))


def to_grpc_code(code: Code) -> grpc.StatusCode:
    """The same code in grpc's enumeration."""
    return _GRPC_CODES[int(code)]


def from_grpc_code(code: grpc.StatusCode) -> Code:
    """The same code in ours."""
    return Code(int(code.value[0]))


def to_status(error: ServiceError) -> status_pb2.Status:
    """google.rpc.Status with ErrorInfo, and RetryInfo where the error advises a delay."""
    status = status_pb2.Status(code=int(error.code), message=_cut(error.message))
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN))
    if error.retry_delay_s is not None:
        delay = _duration(error.retry_delay_s)
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return status


def from_rpc_error(error: grpc.aio.AioRpcError) -> RemoteError:
    """What a failed call meant. Without details of ours the reason is the code's name."""
    code = from_grpc_code(error.code())
    reason, delay = code.name, None
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            reason, delay = _read_details(value, reason)
    return RemoteError(code, reason, error.details() or code.name, retry_delay_s=delay)


def to_error_message(error: ServiceError) -> error_pb2.Error:
    """The error as data, for streams that carry many requests."""
    message = error_pb2.Error(code=int(error.code), message=_cut(error.message), reason=error.reason)
    if error.retry_delay_s is not None:
        message.retry_delay.CopyFrom(_duration(error.retry_delay_s))
    return message


def from_error_message(message: error_pb2.Error) -> RemoteError:
    """The inverse of to_error_message. A code that no version of gRPC knows becomes UNKNOWN."""
    code = Code(message.code) if message.code in _GRPC_CODES else Code.UNKNOWN
    delay = _seconds(message.retry_delay) if message.HasField("retry_delay") else None
    return RemoteError(code, message.reason or code.name, message.message, retry_delay_s=delay)


@contextmanager
def remote_errors() -> Iterator[None]:
    """Inside, a call that fails raises RemoteError in place of grpc's own exception."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error


def _read_details(value: bytes, reason: str) -> tuple[str, float | None]:
    """Reason and retry delay out of a serialized google.rpc.Status; what cannot be read is skipped."""
    delay = None
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    try:
        for detail in status_pb2.Status.FromString(value).details:
            if detail.Unpack(info) and info.reason:
                reason = info.reason
            elif detail.Unpack(retry):
                delay = _seconds(retry.retry_delay)
    except DecodeError:
        pass  # a proxy between us may cut metadata; code and text still say what happened
    return reason, delay


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(max(0, round(seconds * 1e9)))
    return duration


def _seconds(duration: Duration) -> float:
    return duration.ToNanoseconds() / 1e9


def _remake(code: Code, reason: str, message: str, retry_delay_s: float | None) -> RemoteError:
    return RemoteError(code, reason, message, retry_delay_s=retry_delay_s)
