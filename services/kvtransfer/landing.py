"""The receiving end of a push: a claim on pages of pools of this service, checked against the grant.

Every transport lands its bytes through this: shm within the service, and one that crosses services at the far end.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from services.kvtransfer.errors import InvalidPages, InvalidRequest, UnknownPool
from services.kvtransfer.gate import Gate
from services.kvtransfer.pool import Pool, PoolShape
from services.protocol.address import KvAddress, KvShard
from services.protocol.errors import LayoutMismatch, OutsideWindow, ReservationGone, ServiceError
from services.protocol.extents import Extent, Leg, legs
from services.protocol.grants import AlreadyCommitted, Attempt, GrantKey, PoolPages
from services.protocol.ranges import TokenRange


@dataclass(frozen=True, slots=True)
class Claim:
    """An attempt as its writer names it. `range` is everything that the attempt will write."""

    range: TokenRange
    number: int
    writer_id: str


@dataclass(frozen=True, slots=True)
class LandingShard:
    """One of the receiver's pools, and its pages for what lands."""

    pool: Pool
    page_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Landing:
    """The right to write `part` of an attempt, for the sender's `extent` of the model, into pages of `shards`.

    `legs` say what of it goes to which of the shards.
    """

    gate: Gate
    attempt: Attempt
    part: TokenRange
    extent: Extent
    shards: tuple[LandingShard, ...]
    legs: tuple[Leg, ...]

    def begin_write(self, part: TokenRange) -> None:
        """As Gate.begin_write."""
        self.gate.begin_write(self.attempt, part)

    def end_write(self, pool: Pool, num_bytes: int) -> None:
        """As Gate.end_write; the bytes went into `pool`."""
        pool.count_received(num_bytes)
        self.gate.end_write(self.attempt, num_bytes)

    def refusal(self) -> ServiceError | None:
        """As Gate.refusal."""
        return self.gate.refusal(self.attempt)

    def fence_listener(self, listener: Callable[[], None]) -> AbstractContextManager[None]:
        """As Gate.fence_listener."""
        return self.gate.fence_listener(self.attempt, listener)

    def mark_in_place(self) -> bool:
        """As Gate.mark_in_place, for the whole part and extent."""
        return self.gate.mark_in_place(self.attempt, self.part, self.extent)


class Landings:
    """Admits writers. `find_pool` raises UnknownPool or StaleEpoch."""

    def __init__(self, gate: Gate, find_pool: Callable[[str], Pool]) -> None:
        self._gate = gate
        self._find_pool = find_pool

    async def open(
        self, address: KvAddress, claim: Claim, part: TokenRange, extent: Extent
    ) -> Landing | AlreadyCommitted:
        """Opens or joins the attempt, for a sender that holds `extent` of the model. A predecessor that it supersedes
        writes no more when this returns.

        Raises what check and Gate.open_attempt raise. Cancelling opens nothing.
        """
        shards = self.check(address, claim, part)
        ways = legs(extent, [shard.pool.shape.part.extent for shard in shards])
        attempt = await self._gate.open_attempt(
            _key(address), address.secret, claim.range, claim.number, claim.writer_id
        )
        if isinstance(attempt, AlreadyCommitted):
            return attempt
        self._gate.begin_part(attempt, part, extent)
        return Landing(self._gate, attempt, part, extent, shards, ways)

    def admit(self, address: KvAddress, challenge: bytes, proof: bytes) -> KvAddress:
        """The address with its secret, which the writer did not tell but prove: see protocol.grants.prove.

        Raises WrongSecret, ReservationGone, InvalidRequest.
        """
        self._pool(address.shards[:1])
        return replace(address, secret=self._gate.check_proof(_key(address), challenge, proof).secret)

    async def end(self, address: KvAddress, claim: Claim) -> bool:
        """Ends an attempt, known or not. Returns whether its range is committed. Raises what open raises."""
        self._pool(address.shards[:1])
        return await self._gate.end_attempt(_key(address), address.secret, claim.range, claim.number, claim.writer_id)

    async def drop(self, attempt: Attempt) -> None:
        """Ends an attempt whose writer is gone. Raises NotDrained."""
        await self._gate.drop_attempt(attempt)

    def check(self, address: KvAddress, claim: Claim, part: TokenRange) -> tuple[LandingShard, ...]:
        """The pools and their pages for `part`, if the address is what was granted and the claim is within it.

        Raises WrongSecret, ReservationGone, LayoutMismatch, InvalidPages, InvalidRequest, OutsideWindow.
        """
        self._pool(address.shards[:1])
        spec = self._gate.check(_key(address), address.secret)
        granted = tuple(PoolPages(shard.pool_id, shard.page_ids) for shard in address.shards)
        pools = [self._pool((shard,)) for shard in address.shards]
        for shard, pool in zip(address.shards, pools, strict=True):
            _check_shard(shard, pool.shape, address)
        if granted != spec.pools:
            raise InvalidPages("the address names other pages than the grant")
        if address.window != spec.window:
            raise InvalidRequest("the address states another window than the grant")
        if not spec.window.contains(claim.range) or not claim.range.contains(part):
            raise OutsideWindow(f"{part} of {claim.range} is not inside the window {spec.window}")
        page_size = address.layout.page_size
        first = spec.window.begin // page_size
        indices = part.page_indices(page_size)
        pages = slice(indices.start - first, indices.stop - first)
        return tuple(
            LandingShard(pool, shard.page_ids[pages]) for shard, pool in zip(address.shards, pools, strict=True)
        )

    def _pool(self, shards: tuple[KvShard, ...]) -> Pool:
        if not shards:
            raise InvalidRequest("the address names no pool")
        try:
            return self._find_pool(shards[0].pool_id)
        except UnknownPool:
            # Seen from the sender: the receiver was replaced, and its reservations went with it.
            raise ReservationGone("the receiver's pool is no more") from None


def check_convertible(source: PoolShape, address: KvAddress) -> None:
    """Raises LayoutMismatch unless what `source` holds has its place at the receiver, however that arranges it."""
    ours, theirs = source.layout, address.layout
    if ours.dtype is not theirs.dtype:
        raise LayoutMismatch(f"the sender's KV is {ours.dtype.value}, the receiver's {theirs.dtype.value}")
    if ours.head_dim != theirs.head_dim:
        raise LayoutMismatch(f"heads have {ours.head_dim} values at the sender, {theirs.head_dim} at the receiver")
    if source.part.whole != address.whole:
        raise LayoutMismatch("the models of sender and receiver have other numbers of layers or KV heads")
    legs(source.part.extent, [shard.extent for shard in address.shards])


def _check_shard(shard: KvShard, shape: PoolShape, address: KvAddress) -> None:
    if (shard.layers, shard.kv_heads) != (shape.part.extent.layers, shape.part.extent.kv_heads):
        raise LayoutMismatch("the address names other layers or heads than its pool holds")
    layout = replace(shape.layout, layer_count=address.layout.layer_count, kv_head_count=address.layout.kv_head_count)
    if address.whole != shape.part.whole or layout != address.layout:
        raise LayoutMismatch("the address states a layout that its pool does not have")


def _key(address: KvAddress) -> GrantKey:
    return GrantKey(address.shards[0].pool_id, address.reservation_id)
