"""The calls of kvtransfer.v1 as the engine makes them, in its own data. Every method raises RemoteError."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc.aio
from microserve.kvtransfer.v1 import kvtransfer_pb2 as pb
from microserve.kvtransfer.v1 import kvtransfer_pb2_grpc

from services.engine.convert import from_ranges
from services.engine.core.ports import GrantSpec, PushSpec
from services.protocol.errors import Code
from services.protocol.layout import PageLayout
from services.protocol.ranges import RangeSet
from services.rpc.kv_messages import address_message, layout_message, range_message
from services.rpc.status import RemoteError, remote_errors

# A revoke waits for copies under way, which the service itself bounds at five seconds.
CALL_TIMEOUT_S = 10.0
# Making a pool touches all of its memory, and attaching drains the pool's earlier engine.
POOL_TIMEOUT_S = 120.0
# The service ends a push that stands still after half of this; past it, the service itself is in doubt.
PUSH_SILENCE_S = 60.0

_LAST_PUSH_STATES = (pb.PUSH_STATE_DONE, pb.PUSH_STATE_COMMITTED)


@dataclass(frozen=True, slots=True)
class PoolRef:
    """A pool as one incarnation of the service knows it."""

    pool_id: str
    epoch: bytes


@dataclass(frozen=True, slots=True)
class Invitation:
    """Where the pool's memory is handed out, and where peers reach the service."""

    socket_path: str
    ticket: bytes
    endpoint: str
    ready_slots: int


@dataclass(frozen=True, slots=True)
class GrantCondition:
    """What the service says of a grant. A drained one is written no more."""

    reservation_id: str
    committed: RangeSet
    writing: bool
    drained: bool
    bytes: int


@dataclass(frozen=True, slots=True)
class PushProgress:
    """How far a push is."""

    last: bool
    committed: bool
    bytes: int
    exposed_s: float


class TransferClient:
    """One engine's calls to one KV transfer service, over whatever incarnations it lives."""

    def __init__(self, channel: grpc.aio.Channel, incarnation: bytes) -> None:
        self._stub: kvtransfer_pb2_grpc.KvTransferServiceAsyncStub = kvtransfer_pb2_grpc.KvTransferServiceStub(channel)
        self.incarnation = incarnation

    async def create_pool(self, name: str, layout: PageLayout, page_count: int, gpu: bytes, adopt: bool) -> PoolRef:
        """Makes the engine's pool, on a GPU if one is named, or announces that its descriptors will be handed back."""
        request = pb.CreatePoolRequest(
            engine_name=name, layout=layout_message(layout), page_count=page_count, gpu=gpu, adopt=adopt
        )
        with remote_errors():
            reply = await self._stub.CreatePool(request, timeout=POOL_TIMEOUT_S)
        return PoolRef(reply.pool_id, reply.epoch)

    async def attach_pool(self, pool: PoolRef) -> Invitation:
        """Makes this engine the pool's engine."""
        request = pb.AttachPoolRequest(pool_id=pool.pool_id, incarnation=self.incarnation)
        with remote_errors():
            reply = await self._stub.AttachPool(request, timeout=POOL_TIMEOUT_S)
        return Invitation(reply.socket_path, reply.ticket, reply.endpoint, reply.ready_slot_count)

    async def transports(self) -> tuple[str, ...]:
        """Names of the transports on offer, best first."""
        with remote_errors():
            reply = await self._stub.GetStats(pb.GetStatsRequest(), timeout=CALL_TIMEOUT_S)
        return tuple(transport.name for transport in reply.transports)

    async def grant(self, pool: PoolRef, spec: GrantSpec) -> None:
        """Opens a window."""
        request = pb.GrantRequest(
            pool_id=pool.pool_id,
            incarnation=self.incarnation,
            reservation_id=spec.reservation_id,
            secret=spec.secret,
            window=range_message(spec.window),
            page_ids=spec.page_ids,
        )
        with remote_errors():
            await self._stub.Grant(request, timeout=CALL_TIMEOUT_S)

    async def revoke(self, pool: PoolRef, reservation_id: str) -> RangeSet:
        """Closes a window; nothing writes through it when this returns, with what was committed."""
        request = pb.RevokeRequest(pool_id=pool.pool_id, incarnation=self.incarnation, reservation_id=reservation_id)
        with remote_errors():
            reply = await self._stub.Revoke(request, timeout=CALL_TIMEOUT_S)
        return from_ranges(reply.committed)

    async def push(self, pool: PoolRef, spec: PushSpec) -> AsyncIterator[PushProgress]:
        """Moves pages. Ends after the last state; ending earlier by an error of the service means that it has stopped.

        Closing or cancelling asks the service to stop, and does not wait until it has.
        """
        request = pb.PushRequest(
            pool_id=pool.pool_id,
            incarnation=self.incarnation,
            page_ids=spec.page_ids,
            range=range_message(spec.range),
            target=address_message(spec.target),
            attempt=spec.attempt,
            attempt_range=range_message(spec.attempt_range),
            ready_slot=spec.ready_slot,
            writer_id=spec.writer_id,
        )
        call = self._stub.Push(request)
        try:
            while True:
                with remote_errors():
                    async with asyncio.timeout(PUSH_SILENCE_S):
                        reply = await call.read()
                if not isinstance(reply, pb.PushResponse):
                    raise RemoteError(Code.UNKNOWN, "UNKNOWN", "The push ended before its last message.")
                last = reply.state in _LAST_PUSH_STATES
                committed = reply.state == pb.PUSH_STATE_COMMITTED
                yield PushProgress(last, committed, reply.bytes, reply.exposed.ToNanoseconds() / 1e9)
                if last:
                    return
        except TimeoutError:
            raise RemoteError(
                Code.UNAVAILABLE, "UNAVAILABLE", "The KV transfer service says nothing of a push any more."
            ) from None
        finally:
            call.cancel()

    async def end_attempt(self, pool: PoolRef, spec: PushSpec) -> bool:
        """Gives an attempt up; nothing of it moves when this returns. Whether it had been committed before."""
        request = pb.EndAttemptRequest(
            pool_id=pool.pool_id,
            incarnation=self.incarnation,
            target=address_message(spec.target),
            attempt=spec.attempt,
            attempt_range=range_message(spec.attempt_range),
            writer_id=spec.writer_id,
        )
        with remote_errors():
            reply = await self._stub.EndAttempt(request, timeout=CALL_TIMEOUT_S)
        return reply.committed

    async def watch_grants(self, pool: PoolRef) -> AsyncIterator[list[GrantCondition]]:
        """The condition of every grant of the pool, then every change."""
        request = pb.WatchGrantsRequest(pool_id=pool.pool_id, incarnation=self.incarnation)
        call = self._stub.WatchGrants(request)
        try:
            with remote_errors():
                async for reply in call:
                    yield [_to_condition(event) for event in reply.events]
        finally:
            call.cancel()


def _to_condition(event: pb.GrantEvent) -> GrantCondition:
    return GrantCondition(
        reservation_id=event.reservation_id,
        committed=from_ranges(event.committed),
        writing=event.state == pb.GRANT_STATE_WRITING,
        drained=event.state == pb.GRANT_STATE_DRAINED,
        bytes=event.bytes,
    )
