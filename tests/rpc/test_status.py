"""Mapping of codes and of errors as data, in both directions."""

from __future__ import annotations

import pickle

import grpc
import grpc.aio
import pytest
from microserve.types.v1 import error_pb2

from services.protocol.errors import Code, ReservationGone
from services.rpc.status import (
    DETAILS_KEY,
    RemoteError,
    from_error_message,
    from_grpc_code,
    from_rpc_error,
    to_error_message,
    to_grpc_code,
    to_status,
)


@pytest.mark.parametrize("code", list(Code))
def test_codes_map_both_ways(code: Code) -> None:
    assert to_grpc_code(code).name == code.name
    assert from_grpc_code(to_grpc_code(code)) is code


def test_every_grpc_code_has_ours() -> None:
    assert {from_grpc_code(code) for code in grpc.StatusCode} == set(Code)


@pytest.mark.parametrize("delay", [None, 0.0, 1.5])
def test_error_message_round_trip(delay: float | None) -> None:
    error = from_error_message(to_error_message(ReservationGone("late", retry_delay_s=delay)))
    assert (error.code, error.reason, error.message) == (Code.ABORTED, "RESERVATION_GONE", "late")
    assert error.retry_delay_s == delay


def test_error_message_with_an_unknown_code() -> None:
    error = from_error_message(error_pb2.Error(code=99, message="?"))
    assert (error.code, error.reason) == (Code.UNKNOWN, "UNKNOWN")


def test_remote_error_passes_on_what_the_peer_said() -> None:
    error = RemoteError(Code.NOT_FOUND, "UNKNOWN_RESERVATION", "gone", retry_delay_s=2.0)
    assert to_status(error).code == Code.NOT_FOUND
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.code, copy.reason, copy.message, copy.retry_delay_s) == (
        Code.NOT_FOUND,
        "UNKNOWN_RESERVATION",
        "gone",
        2.0,
    )


def test_details_that_cannot_be_read_leave_code_and_text() -> None:
    trailers = grpc.aio.Metadata((DETAILS_KEY, b"\xff\xff\xff"))
    rpc_error = grpc.aio.AioRpcError(
        grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), trailers, details="connection lost"
    )
    error = from_rpc_error(rpc_error)
    assert (error.code, error.reason, error.message) == (Code.UNAVAILABLE, "UNAVAILABLE", "connection lost")
