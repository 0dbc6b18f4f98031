"""Requests of engine.v1 into commands for the loop thread, validated on the way.

Every function raises a leaf of ServiceError if the request makes no sense. A request that wants one answer becomes an
Ask: a function that makes the command once it is known where the answer goes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias, TypeVar

from microserve.engine.v1 import engine_pb2

from services.engine.convert import from_address, from_duration, from_range, from_sampling
from services.engine.core import api
from services.engine.core.admission import check_position, check_prompt, check_start_generate
from services.engine.core.api import Reply, RequestKey, ReservationRef
from services.engine.errors import BadRequest, BadSampling
from services.engine.front.limits import (
    MAX_ATTEMPT,
    MAX_SHARDS,
    Limits,
    check_address,
    check_digest,
    check_inside,
    check_name,
    check_salt,
    shown,
)
from services.protocol.timing import Timing

T = TypeVar("T")
Ask: TypeAlias = Callable[[Reply[T]], api.Command]


def to_key(owner_id: str, request_id: str, client_request_id: str = "") -> RequestKey:
    """Who calls, and their name for the call."""
    check_name("owner_id", owner_id)
    check_name("request_id", request_id)
    return RequestKey(owner_id, request_id, shown(client_request_id))


def to_prep_recv(request: engine_pb2.PrepRecvRequest, key: RequestKey, limits: Limits) -> Ask[api.Reserved]:
    """A PrepRecv."""
    prompt = tuple(request.prompt_token_ids)
    check_prompt(prompt, limits)
    check_position("end", request.end, len(prompt))
    check_salt(request.cache_salt)
    lease_s = from_duration(request.lease, "lease", clip=True) if request.HasField("lease") else None
    max_wait_s = from_duration(request.max_wait, "max_wait", clip=True) if request.HasField("max_wait") else None
    return lambda reply: api.PrepRecv(key, prompt, request.end, request.cache_salt, lease_s, max_wait_s, reply)


def to_remote_send(
    request: engine_pb2.RemoteSendRequest, key: RequestKey, limits: Limits, deadline: float | None
) -> Ask[Timing]:
    """A RemoteSend; `deadline` is on the engine's clock."""
    prompt = tuple(request.prompt_token_ids)
    check_prompt(prompt, limits)
    tokens = from_range(request.range)
    check_position("range.end", tokens.end, len(prompt))
    check_salt(request.cache_salt)
    if request.attempt > MAX_ATTEMPT:
        raise BadRequest(f"attempt must be at most {MAX_ATTEMPT}.")
    if not request.HasField("address"):
        raise BadRequest("address is missing.")
    if len(request.address.shards) > MAX_SHARDS:  # before time is spent on each
        raise BadRequest(f"address.shards must be at most {MAX_SHARDS}.")
    address = from_address(request.address)
    check_address(address)
    check_position("address.window.end", address.window.end, len(prompt))
    check_inside(tokens, address.window)
    check_position("prompt_token_count", request.prompt_token_count, len(prompt))
    prompt_count = request.prompt_token_count or len(prompt)
    return lambda reply: api.RemoteSend(
        key, prompt, tokens, address, max(request.attempt, 1), request.cache_salt, deadline, reply, prompt_count
    )


def to_timeout(request: engine_pb2.PrepRecvRequest | engine_pb2.RemoteSendRequest) -> float | None:
    """The time that a verb is allowed beside its call's deadline, in seconds."""
    return from_duration(request.timeout, "timeout") if request.HasField("timeout") else None


def to_start_generate(
    request: engine_pb2.StartGenerateRequest, limits: Limits, now: float, call_deadline: float | None
) -> api.StartGenerate:
    """The command of a StartGenerate, wherever it came from; times are on the engine's clock."""
    prompt = tuple(request.prompt_token_ids)
    check_salt(request.cache_salt)
    deadlines = [] if call_deadline is None else [call_deadline]
    if request.HasField("timeout"):
        deadlines.append(now + from_duration(request.timeout, "timeout"))
    command = api.StartGenerate(
        key=to_key(request.owner_id, request.request_id, request.client_request_id),
        prompt=prompt,
        begin=request.begin,
        prompt_token_count=request.prompt_token_count or len(prompt),
        sampling=from_sampling(request.sampling),
        reservation=to_reservation(request.reservation) if request.HasField("reservation") else None,
        cache_salt=request.cache_salt,
        deadline=min(deadlines, default=None),
        forced=tuple(request.forced_token_ids),
        prompt_logprobs_begin=request.prompt_logprobs_begin,
    )
    check_start_generate(command, limits)
    max_tokens = command.sampling.max_tokens
    if max_tokens is not None and len(prompt) - command.prompt_token_count >= max_tokens:
        raise BadSampling("max_tokens are there already: nothing is left to generate.")
    return command


def to_reservation(message: engine_pb2.ReservationRef) -> ReservationRef:
    """A reservation and the claim to it."""
    check_name("reservation.reservation_id", message.reservation_id)
    check_digest("reservation.secret", message.secret)
    return ReservationRef(message.reservation_id, message.secret)


def to_release(request: engine_pb2.ReleaseRequest) -> Ask[int]:
    """A Release."""
    reservation = to_reservation(request.reservation)
    return lambda reply: api.Release(reservation, request.publish, reply)


def to_renew(request: engine_pb2.RenewRequest) -> Ask[float]:
    """A Renew."""
    reservation = to_reservation(request.reservation)
    lease_s = from_duration(request.lease, "lease", clip=True) if request.HasField("lease") else None
    return lambda reply: api.Renew(reservation, lease_s, reply)


def to_abort(request: engine_pb2.AbortRequest) -> Ask[None]:
    """An Abort."""
    key = to_key(request.owner_id, request.request_id)
    return lambda reply: api.Abort(key, reply)


def to_list_reservations(request: engine_pb2.ListReservationsRequest) -> Ask[tuple[api.ReservationInfo, ...]]:
    """A ListReservations."""
    if request.owner_id:
        check_name("owner_id", request.owner_id)
    return lambda reply: api.ListReservations(request.owner_id, reply)
