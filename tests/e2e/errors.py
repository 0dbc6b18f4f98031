"""What a failed call said."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status


class Failure:
    """Filled when the block of failing() has failed."""

    code: grpc.StatusCode
    reason: str
    message: str
    retry_delay_s: float | None = None


@contextmanager
def failing(code: grpc.StatusCode, reason: str | None = None) -> Iterator[Failure]:
    """The block must fail with this status code and reason, and with a sentence."""
    failure = Failure()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        yield failure
    error = caught.value
    failure.code, failure.message, failure.reason = error.code(), error.details() or "", ""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    for detail in status.details if status is not None else ():
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            failure.reason = info.reason
        elif detail.Unpack(retry):
            failure.retry_delay_s = retry.retry_delay.ToTimedelta().total_seconds()
    assert failure.code == code, f"{failure.code} {failure.reason}: {failure.message}"
    if reason is not None:
        assert failure.reason == reason, f"{failure.reason}: {failure.message}"
        assert len(failure.message) > 10, "an error needs a sentence"


async def outcome(call: Awaitable[object]) -> grpc.StatusCode:
    """OK or the code that the call failed with."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    except asyncio.CancelledError:
        return grpc.StatusCode.CANCELLED
    return grpc.StatusCode.OK
