"""Everything that engines send: admits pushes, picks their transport, ends them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.kvtransfer.books import Books
from services.kvtransfer.errors import EngineGone, InvalidRequest, NotDrained, NoTransport, PushCancelled
from services.kvtransfer.landing import Claim
from services.kvtransfer.pool import Pool
from services.kvtransfer.pool_table import PoolTable
from services.kvtransfer.push import AllReady, Push, ReadySource, SlotReady
from services.kvtransfer.transports.base import PutRequest, Transport
from services.protocol.address import KvAddress
from services.protocol.errors import AttemptSuperseded, RangeOverlaps, ReservationGone, ServiceError, StaleEpoch
from services.protocol.ranges import TokenRange

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PushOrder:
    """What a sender's engine asks for. `ready_slot` None: every layer is computed already."""

    pool_id: str
    incarnation: bytes
    page_ids: tuple[int, ...]
    part: TokenRange
    address: KvAddress
    claim: Claim
    ready_slot: int | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """Which incarnation of which service this is. `endpoint` is known once the service is bound."""

    epoch: bytes
    endpoint: Callable[[], str]


class Pushes:
    """The pushes of all pools. Belongs to the running loop."""

    def __init__(
        self,
        pools: PoolTable,
        transports: Sequence[Transport],
        books: Books,
        place: Place,
        stall_timeout_s: float,
    ) -> None:
        """`transports`, best first."""
        self._pools = pools
        self._transports = transports
        self._books = books
        self._place = place
        self._stall_timeout_s = stall_timeout_s

    def live(self) -> list[Push]:
        """Pushes under way."""
        return [push for pool in self._pools.all() for push in pool.pushes]

    async def begin(self, order: PushOrder) -> Push:
        """Begins a push. An earlier push of the same part by the same attempt is ended first.

        Raises StaleEpoch, StaleIncarnation, InvalidPages, InvalidRequest, NoTransport; what the receiving side
        refuses comes from Push.updates. Cancelling begins nothing.
        """
        while earlier := self._repeated_by(order):
            for push in earlier:
                push.stop(PushCancelled("the same part was pushed again"))
                await push.ended()
        try:
            pool, ready = self._admit(order)
            transport = self._choose(pool, order.address)
        except ServiceError as error:
            self._books.refused(error)
            raise
        request = PutRequest(pool, order.page_ids, order.part, order.address, _own_claim(order))
        push = Push(request, transport, ready, self._stall_timeout_s, self._books)
        pool.pushes.add(push)
        return push

    async def end_attempt(self, pool_id: str, incarnation: bytes, address: KvAddress, claim: Claim) -> bool:
        """Gives an attempt up. When this returns none of its pushes reads or writes, nor will one that is still on
        its way. Returns whether its range is committed, which then stands.

        Raises StaleIncarnation, StaleEpoch, NoTransport, WrongSecret, OutsideWindow, NotDrained.
        """
        pool = self._pools.find(pool_id)
        pool.require(incarnation)
        transport = self._choose(pool, address)
        claim = _as_writer(claim, pool_id, incarnation)
        pushes = [push for push in pool.pushes if _attempt_of(push) == (address, claim)]
        for push in pushes:
            push.stop(PushCancelled("the attempt was ended"))
        committed = False
        with contextlib.suppress(ReservationGone, AttemptSuperseded, RangeOverlaps):
            committed = await transport.end_attempt(address, claim)
        for push in pushes:
            await push.ended()
        pool.attempts.discard((address, claim))
        return committed

    def engine_gone(self, pool: Pool) -> None:
        """Ends what the pool's engine was sending, in the background: Pool.cleanup is done when nothing is left."""
        for push in pool.pushes:
            push.stop(EngineGone("the engine that pushed is gone"))
        pool.cleanup = asyncio.create_task(self._clean_up(pool))

    async def drained(self, pool: Pool, timeout_s: float) -> None:
        """Returns when nothing of the last engine's sending is left. Raises NotDrained."""
        if pool.cleanup is not None:
            _, pending = await asyncio.wait([pool.cleanup], timeout=timeout_s)
            if pending:
                raise NotDrained("pushes of the last engine are still under way")

    async def finish(self, why: ServiceError | None) -> None:
        """Returns when every push has ended; those that have not are stopped if there is a reason to."""
        for push in self.live():
            if why is not None:
                push.stop(why)
        for push in self.live():
            await push.ended()

    async def _clean_up(self, pool: Pool) -> None:
        for push in tuple(pool.pushes):
            await push.ended()
        for address, claim in tuple(pool.attempts):
            # Whatever ended the attempt before did so for good.
            with contextlib.suppress(ServiceError):
                await self._choose(pool, address).end_attempt(address, claim)
        pool.attempts.clear()

    def _admit(self, order: PushOrder) -> tuple[Pool, ReadySource]:
        """The sender's side of an order, checked."""
        pool = self._pools.find(order.pool_id)
        memory = pool.require(order.incarnation)
        if not order.part or not order.claim.range.contains(order.part):
            raise InvalidRequest(f"a push of {order.part} in an attempt at {order.claim.range}")
        pool.shape.check_pages(order.page_ids, order.part)
        if order.ready_slot is None:
            return pool, AllReady(pool.shape.layout.layer_count)
        if order.ready_slot >= memory.control.slot_count:
            raise InvalidRequest(f"ready slot {order.ready_slot} is not below {memory.control.slot_count}")
        return pool, SlotReady(memory.control, order.ready_slot)

    def _choose(self, source: Pool, address: KvAddress) -> Transport:
        """The best transport that can. Raises StaleEpoch or NoTransport; the latter is logged and counted."""
        if address.epoch != self._place.epoch and address.endpoint == self._place.endpoint():
            raise StaleEpoch("the address was made before the transfer service restarted")
        refusals = []
        for transport in self._transports:
            refusal = transport.refuses(source, address)
            if refusal is None:
                return transport
            refusals.append(f"{transport.capabilities.name}: {refusal.why}")
        why = "; ".join(refusals)
        log.warning("no transport", extra={"fields": {"endpoint": address.endpoint, "why": why}})
        self._books.unroutable += 1
        raise NoTransport(why)

    def _repeated_by(self, order: PushOrder) -> list[Push]:
        """Live pushes of the order's attempt that move some of the same tokens."""
        attempt = (order.address, _own_claim(order))
        return [p for p in self.live() if _attempt_of(p) == attempt and p.request.part.overlaps(order.part)]


def _attempt_of(push: Push) -> tuple[KvAddress, Claim]:
    return push.request.address, push.request.claim


def _own_claim(order: PushOrder) -> Claim:
    return _as_writer(order.claim, order.pool_id, order.incarnation)


def _as_writer(claim: Claim, pool_id: str, incarnation: bytes) -> Claim:
    """The claim under a name that no other engine has: nobody joins the attempt of another engine."""
    return Claim(claim.range, claim.number, f"{pool_id}/{incarnation.hex()}/{claim.writer_id}")
