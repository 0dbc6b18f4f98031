"""The receiving end of a push: a claim on pages of a pool of this service, checked against the grant.

Every transport lands its bytes through this: shm within the service, and one that crosses services at the far end.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from services.kvtransfer.errors import InvalidPages, InvalidRequest, NoTransport, UnknownPool
from services.kvtransfer.gate import Gate
from services.kvtransfer.pool import Pool
from services.protocol.address import KvAddress
from services.protocol.errors import LayoutMismatch, OutsideWindow, ReservationGone, ServiceError
from services.protocol.grants import AlreadyCommitted, Attempt, GrantKey
from services.protocol.ranges import TokenRange


@dataclass(frozen=True, slots=True)
class Claim:
    """An attempt as its writer names it. `range` is everything that the attempt will write."""

    range: TokenRange
    number: int
    writer_id: str


@dataclass(frozen=True, slots=True)
class Landing:
    """The right to write `part` of an attempt into `page_ids` of a pool."""

    gate: Gate
    pool: Pool
    attempt: Attempt
    part: TokenRange
    page_ids: tuple[int, ...]

    def begin_write(self, part: TokenRange) -> None:
        """As Gate.begin_write."""
        self.gate.begin_write(self.attempt, part)

    def end_write(self, num_bytes: int) -> None:
        """As Gate.end_write."""
        self.pool.count_received(num_bytes)
        self.gate.end_write(self.attempt, num_bytes)

    def refusal(self) -> ServiceError | None:
        """As Gate.refusal."""
        return self.gate.refusal(self.attempt)

    def fence_listener(self, listener: Callable[[], None]) -> AbstractContextManager[None]:
        """As Gate.fence_listener."""
        return self.gate.fence_listener(self.attempt, listener)

    def mark_in_place(self) -> bool:
        """As Gate.mark_in_place, for the whole part."""
        return self.gate.mark_in_place(self.attempt, self.part)


class Landings:
    """Admits writers. `find_pool` raises UnknownPool or StaleEpoch."""

    def __init__(self, gate: Gate, find_pool: Callable[[str], Pool]) -> None:
        self._gate = gate
        self._find_pool = find_pool

    async def open(self, address: KvAddress, claim: Claim, part: TokenRange) -> Landing | AlreadyCommitted:
        """Opens or joins the attempt. A predecessor that it supersedes writes no more when this returns.

        Raises what check and Gate.open_attempt raise. Cancelling opens nothing.
        """
        pool, page_ids = self.check(address, claim, part)
        key = GrantKey(pool.id, address.reservation_id)
        attempt = await self._gate.open_attempt(key, address.secret, claim.range, claim.number, claim.writer_id)
        if isinstance(attempt, AlreadyCommitted):
            return attempt
        return Landing(self._gate, pool, attempt, part, page_ids)

    async def end(self, address: KvAddress, claim: Claim) -> bool:
        """Ends an attempt, known or not. Returns whether its range is committed. Raises what open raises."""
        pool = self._pool(address)
        key = GrantKey(pool.id, address.reservation_id)
        return await self._gate.end_attempt(key, address.secret, claim.range, claim.number, claim.writer_id)

    def check(self, address: KvAddress, claim: Claim, part: TokenRange) -> tuple[Pool, tuple[int, ...]]:
        """The pool and its pages for `part`, if the address is what was granted and the claim is within it.

        Raises WrongSecret, ReservationGone, LayoutMismatch, InvalidPages, InvalidRequest, OutsideWindow.
        """
        pool = self._pool(address)
        spec = self._gate.check(GrantKey(pool.id, address.reservation_id), address.secret)
        layout = pool.shape.layout
        shard = address.shards[0]
        if address.layout != layout:
            raise LayoutMismatch("the address states a layout that its pool does not have")
        if (shard.layers, shard.kv_heads) != ((0, layout.layer_count), (0, layout.kv_head_count)):
            raise LayoutMismatch("the address names a part of the pool's layers or heads")
        if shard.page_ids != spec.page_ids:
            raise InvalidPages("the address names other pages than the grant")
        if address.window != spec.window:
            raise InvalidRequest("the address states another window than the grant")
        if not spec.window.contains(claim.range) or not claim.range.contains(part):
            raise OutsideWindow(f"{part} of {claim.range} is not inside the window {spec.window}")
        first = spec.window.begin // layout.page_size
        indices = part.page_indices(layout.page_size)
        return pool, spec.page_ids[indices.start - first : indices.stop - first]

    def _pool(self, address: KvAddress) -> Pool:
        if len(address.shards) != 1:
            raise NoTransport("the receiver's KV is split over several pools")
        try:
            return self._find_pool(address.shards[0].pool_id)
        except UnknownPool:
            # Seen from the sender: the receiver was replaced, and its reservations went with it.
            raise ReservationGone("the receiver's pool is no more") from None
