"""Everything that engines send: admits pushes and ends them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from dataclasses import dataclass

from services.kvtransfer.books import Books
from services.kvtransfer.errors import (
    EngineGone,
    InvalidRequest,
    NotDrained,
    PeerLost,
    PeerUnreachable,
    PushCancelled,
    TransportFailed,
)
from services.kvtransfer.landing import Claim, check_convertible
from services.kvtransfer.links import Links
from services.kvtransfer.outbox import Outbox, attempt_of
from services.kvtransfer.pool import Pool
from services.kvtransfer.pool_table import PoolTable
from services.kvtransfer.push import AllReady, Push, ReadySource, SlotReady
from services.kvtransfer.transports.base import Peer, PutRequest
from services.protocol.address import KvAddress
from services.protocol.errors import AttemptSuperseded, RangeOverlaps, ReservationGone, ServiceError, StaleEpoch
from services.protocol.ranges import TokenRange
from services.rpc.log import log_failure


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


_OUT_OF_REACH = (PeerUnreachable, PeerLost, TransportFailed, StaleEpoch)


class Pushes:
    """The pushes of all pools. Belongs to the running loop."""

    def __init__(
        self,
        pools: PoolTable,
        links: Links,
        books: Books,
        stall_timeout_s: float,
    ) -> None:
        self._pools = pools
        self._links = links
        self._books = books
        self._stall_timeout_s = stall_timeout_s
        self._outboxes: dict[str, Outbox] = {}  # by pool; made when first needed

    def live(self) -> list[Push]:
        """Pushes under way."""
        return [push for outbox in self._outboxes.values() for push in outbox.pushes]

    def count(self, pool: Pool) -> int:
        """How many of them are out of `pool`; any thread."""
        outbox = self._outboxes.get(pool.id)
        return 0 if outbox is None else len(outbox.pushes)

    async def begin(self, order: PushOrder) -> Push:
        """Begins a push. An earlier push of the same part by the same attempt is ended first.

        Raises StaleEpoch, StaleIncarnation, InvalidPages, InvalidRequest, LayoutMismatch, NoTransport, PeerUnreachable;
        what the receiving side refuses comes from Push.updates. Cancelling begins nothing.
        """
        try:
            peer = await self._links.peer(order.address)
            return await self._begin(order, peer)
        except ServiceError as error:
            self._books.refused(error)
            raise

    async def _begin(self, order: PushOrder, peer: Peer) -> Push:
        while earlier := self._repeated_by(order):
            for push in earlier:
                push.stop(PushCancelled("the same part was pushed again"))
                await push.ended()
        pool, ready = self._admit(order)
        route = self._links.route(pool, order.address, peer)
        request = PutRequest(peer, pool, order.page_ids, order.part, order.address, _own_claim(order))
        outbox = self._outbox(pool)
        push = Push(request, route, ready, self._stall_timeout_s, outbox)
        outbox.pushes.add(push)
        return push

    async def end_attempt(self, pool_id: str, incarnation: bytes, address: KvAddress, claim: Claim) -> bool:
        """Gives an attempt up. When this returns none of its pushes reads or writes, nor will one that is still on
        its way. Returns whether its range is committed, which then stands.

        A receiver that is out of reach ends it by itself, and with one that restarted it is over. Raises
        StaleIncarnation, StaleEpoch if the pool is of an earlier incarnation, NoTransport, WrongSecret, OutsideWindow,
        NotDrained.
        """
        pool = self._pools.find(pool_id)
        pool.require(incarnation)
        claim = _as_writer(claim, incarnation)
        outbox = self._outbox(pool)
        pushes = [push for push in self.live() if attempt_of(push) == (address, claim)]
        for push in pushes:
            push.stop(PushCancelled("the attempt was ended"))
        # Here too, because a peer that is out of reach cannot remember it for us.
        outbox.ended_attempts.add((address, claim))
        committed = False
        try:
            # Out of reach: the attempt ends there with the connection that it came over.
            with contextlib.suppress(ReservationGone, AttemptSuperseded, RangeOverlaps, *_OUT_OF_REACH):
                committed = await self._links.end_attempt(pool, address, claim)
        finally:
            for push in pushes:
                await push.ended()
        outbox.open_attempts.discard((address, claim))
        return committed

    def engine_gone(self, pool: Pool) -> None:
        """Ends what the pool's engine was sending, in the background; see drained."""
        outbox = self._outbox(pool)
        for push in outbox.pushes:
            push.stop(EngineGone("the engine that pushed is gone"))
        outbox.cleanup = asyncio.create_task(self._clean_up(pool, outbox), name=f"clean up after {pool.engine_name}")
        outbox.cleanup.add_done_callback(log_failure)

    async def drained(self, pool: Pool, timeout_s: float) -> None:
        """Returns when nothing of the last engine's sending is left. Raises NotDrained."""
        outbox = self._outbox(pool)
        if outbox.cleanup is not None:
            _, pending = await asyncio.wait([outbox.cleanup], timeout=timeout_s)
            if pending:
                raise NotDrained("pushes of the last engine are still under way")
        # The next engine begins with an empty one.
        self._outboxes.pop(pool.id, None)

    async def finish(self, why: ServiceError | None) -> None:
        """Returns when every push has ended; those that have not are stopped if there is a reason to."""
        for push in self.live():
            if why is not None:
                push.stop(why)
        for push in self.live():
            await push.ended()

    def _outbox(self, pool: Pool) -> Outbox:
        return self._outboxes.setdefault(pool.id, Outbox(self._books))

    async def _clean_up(self, pool: Pool, outbox: Outbox) -> None:
        for push in tuple(outbox.pushes):
            await push.ended()
        # Whatever ended an attempt before did so for good.
        endings = (self._links.end_attempt(pool, address, claim) for address, claim in outbox.open_attempts)
        for failure in await asyncio.gather(*endings, return_exceptions=True):
            if isinstance(failure, BaseException) and not isinstance(failure, ServiceError):
                raise failure

    def _admit(self, order: PushOrder) -> tuple[Pool, ReadySource]:
        """The sender's side of an order, checked."""
        pool = self._pools.find(order.pool_id)
        memory = pool.require(order.incarnation)
        if not order.part or not order.claim.range.contains(order.part):
            raise InvalidRequest(f"a push of {order.part} in an attempt at {order.claim.range}")
        pool.shape.check_pages(order.page_ids, order.part)
        check_convertible(pool.shape, order.address)
        if (order.address, _own_claim(order)) in self._outbox(pool).ended_attempts:
            raise AttemptSuperseded("the attempt was ended")
        if order.ready_slot is None:
            return pool, AllReady(pool.shape.layout.layer_count)
        if order.ready_slot >= memory.control.slot_count:
            raise InvalidRequest(f"ready slot {order.ready_slot} is not below {memory.control.slot_count}")
        return pool, SlotReady(memory.control, order.ready_slot)

    def _repeated_by(self, order: PushOrder) -> list[Push]:
        """Live pushes of the order's attempt that move some of the same tokens out of the same pool."""
        attempt = (order.address, _own_claim(order))
        return [
            push
            for push in self.live()
            if (push.request.source.id, attempt_of(push)) == (order.pool_id, attempt)
            and push.request.part.overlaps(order.part)
        ]


def _own_claim(order: PushOrder) -> Claim:
    return _as_writer(order.claim, order.incarnation)


def _as_writer(claim: Claim, incarnation: bytes) -> Claim:
    """The claim under a name that no other engine has, all ranks of one engine share, and tells no incarnation: nobody
    joins the attempt of another engine."""
    return Claim(claim.range, claim.number, f"{hashlib.sha256(incarnation).hexdigest()}/{claim.writer_id}")
