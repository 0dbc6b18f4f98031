"""Grants and attempts: who may write into which pages, right now.

A grant opens the window of a reservation. A sender's attempt claims a range of it; copies of the attempt run between
begin_write and end_write. Fencing an attempt or revoking a grant lets no further copy begin; the copies that are under
way are waited for ("drained") before anyone else may use the pages. An attempt is committed when all of its range is in
place, every layer and head of it, and not before.

A grant may stand for pages in several pools, those of the ranks of a tensor parallel receiver. It is opened, written,
committed and revoked as one.

Pure and not thread-safe: its owner, the transfer service, calls it under one lock.
"""

from __future__ import annotations

import hmac
from collections import OrderedDict
from dataclasses import dataclass, field
from enum import Enum

from services.protocol.errors import (
    AttemptSuperseded,
    GrantConflict,
    InvalidRange,
    OutsideWindow,
    RangeOverlaps,
    ReservationGone,
    WrongSecret,
)
from services.protocol.extents import UNDIVIDED, Coverage, Extent
from services.protocol.ranges import RangeSet, TokenRange

# Revoked reservation ids that are remembered, so that a Grant that was overtaken by its Revoke opens nothing. A call
# lives seconds; this is orders of magnitude more reservations than an engine makes in that time.
MAX_TOMBSTONES = 65_536


@dataclass(frozen=True, slots=True)
class GrantKey:
    """A reservation in a pool."""

    pool_id: str
    reservation_id: str


@dataclass(frozen=True, slots=True)
class PoolPages:
    """Pages of one pool."""

    pool_id: str
    page_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GrantSpec:
    """A window and the pages behind it, in each pool the first one holding window.begin.

    `page_ids` are of the key's pool, `others` of further pools. `whole` is what has to come for a token to be there.
    """

    key: GrantKey
    secret: bytes = field(repr=False)
    window: TokenRange
    page_ids: tuple[int, ...]
    others: tuple[PoolPages, ...] = ()
    whole: Extent = UNDIVIDED

    @property
    def pools(self) -> tuple[PoolPages, ...]:
        """All pools, that of the key first."""
        return (PoolPages(self.key.pool_id, self.page_ids), *self.others)


def prove(secret: bytes, challenge: bytes) -> bytes:
    """Shows that one knows a secret without telling it: good for this challenge only."""
    return hmac.digest(secret, challenge, "sha256")


class GrantState(Enum):
    """Condition of a grant as its engine sees it."""

    OPEN = "OPEN"
    WRITING = "WRITING"
    DRAINED = "DRAINED"


@dataclass(frozen=True, slots=True)
class GrantStatus:
    """Everything the receiver's engine needs to know about a grant."""

    key: GrantKey
    state: GrantState
    committed: RangeSet
    bytes: int


class AlreadyCommitted(Enum):
    """The answer to an attempt at a range whose bytes are all in place: there is nothing to write."""

    VALUE = "already committed"


class Draining(Enum):
    """The answer to an attempt whose fenced predecessor still has a copy under way: ask again when it ended."""

    VALUE = "draining"


class Attempt:
    """A sender's claim on a range. Made and changed only by GrantTable."""

    def __init__(self, key: GrantKey, claimed: TokenRange, number: int, writer_id: str) -> None:
        self.key = key
        self.range = claimed
        self.number = number
        self.writer_id = writer_id
        self.in_place = Coverage()
        self.writes_under_way = 0
        self.fenced = False
        self.committed = False


class _Grant:
    def __init__(self, spec: GrantSpec) -> None:
        self.spec = spec
        self.committed = RangeSet()
        self.attempts: list[Attempt] = []
        self.last_number: dict[TokenRange, int] = {}
        self.revoked = False
        self.bytes = 0

    @property
    def drained(self) -> bool:
        return self.revoked and not any(a.writes_under_way for a in self.attempts)

    def status(self) -> GrantStatus:
        live = any(not a.fenced for a in self.attempts)
        state = GrantState.DRAINED if self.drained else GrantState.WRITING if live else GrantState.OPEN
        return GrantStatus(self.spec.key, state, self.committed, self.bytes)


class GrantTable:
    """All grants of one incarnation of the transfer service."""

    def __init__(self) -> None:
        self._grants: dict[GrantKey, _Grant] = {}
        self._granted_pages: dict[str, set[int]] = {}
        self._tombstones: OrderedDict[GrantKey, RangeSet] = OrderedDict()  # and what was committed
        self._changed: dict[GrantKey, GrantStatus] = {}

    def open_grant(self, spec: GrantSpec) -> None:
        """Opens a window. The same grant again changes nothing.

        Raises GrantConflict if the id stands for another grant or a page is behind another open window, and
        ReservationGone if the id was revoked before.
        """
        known = self._grants.get(spec.key)
        if known is not None and not known.revoked:
            if known.spec != spec:
                raise GrantConflict("this reservation id stands for another grant")
            return
        if known is not None or spec.key in self._tombstones:
            raise ReservationGone("the grant was revoked before it was opened")
        if not spec.window:
            raise InvalidRange("an empty window needs no grant")
        if len({pool.pool_id for pool in spec.pools}) != len(spec.pools):
            raise GrantConflict("a pool comes twice")
        for pool in spec.pools:
            granted = self._granted_pages.get(pool.pool_id, set())
            if not granted.isdisjoint(pool.page_ids) or len(set(pool.page_ids)) != len(pool.page_ids):
                raise GrantConflict("a page stands behind two windows")
        for pool in spec.pools:
            self._granted_pages.setdefault(pool.pool_id, set()).update(pool.page_ids)
        self._grants[spec.key] = _Grant(spec)
        self._note(spec.key)

    def check(self, key: GrantKey, secret: bytes) -> GrantSpec:
        """The grant, if it is open and the secret is right. Raises ReservationGone or WrongSecret."""
        return self._open(key, secret).spec

    def check_proof(self, key: GrantKey, challenge: bytes, proof: bytes) -> GrantSpec:
        """As check, for a writer that shows `prove` of the secret in place of the secret."""
        grant = self._find(key)
        if not hmac.compare_digest(prove(grant.spec.secret, challenge), proof):
            raise WrongSecret("the proof was not made with the secret of the reservation")
        return grant.spec

    def open_attempt(
        self, key: GrantKey, secret: bytes, claimed: TokenRange, number: int, writer_id: str
    ) -> Attempt | AlreadyCommitted | Draining:
        """Claims a range for a writer; the writer's own live attempt of that number is joined.

        A higher number at an equal range fences the attempt before it, and is answered Draining while that still has a
        copy under way. Raises ReservationGone, WrongSecret, OutsideWindow, RangeOverlaps, AttemptSuperseded.
        """
        grant = self._open(key, secret)
        if not claimed:
            raise InvalidRange("an attempt at nothing")
        if not grant.spec.window.contains(claimed):
            raise OutsideWindow(f"{claimed} is not inside the window {grant.spec.window}")
        if grant.committed.covers(claimed):
            return AlreadyCommitted.VALUE
        if grant.committed.overlaps(claimed):
            raise RangeOverlaps(f"{claimed} overlaps what is committed")
        for other in grant.attempts:
            if other.range != claimed and not other.fenced and other.range.overlaps(claimed):
                raise RangeOverlaps(f"{claimed} overlaps the live attempt at {other.range}")
            mine = (other.range, other.number, other.writer_id) == (claimed, number, writer_id)
            if mine and not other.fenced:
                return other
        if number <= grant.last_number.get(claimed, 0):
            raise AttemptSuperseded(f"attempt {number} at {claimed} came before or was overtaken")
        for other in list(grant.attempts):
            if other.range == claimed:
                self._fence(grant, other)
        if any(other.range.overlaps(claimed) for other in grant.attempts):
            return Draining.VALUE
        attempt = Attempt(key, claimed, number, writer_id)
        grant.last_number[claimed] = number
        grant.attempts.append(attempt)
        self._note(key)
        return attempt

    def begin_part(self, attempt: Attempt, part: TokenRange, extent: Extent = UNDIVIDED) -> None:
        """All of `extent` is sent for `part`, perhaps again: until mark_in_place it counts no more."""
        attempt.in_place = attempt.in_place.remove(part, extent)

    def begin_write(self, attempt: Attempt, part: TokenRange) -> None:
        """A copy into `part` is about to begin. Raises ReservationGone or AttemptSuperseded if it must not."""
        self._require_live(attempt)
        if not attempt.range.contains(part):
            raise OutsideWindow(f"{part} is not inside the attempt's range {attempt.range}")
        attempt.writes_under_way += 1

    def end_write(self, attempt: Attempt, num_bytes: int) -> None:
        """A copy that began has ended, whether or not it was fenced meanwhile."""
        attempt.writes_under_way -= 1
        grant = self._grants[attempt.key]
        grant.bytes += num_bytes
        if attempt.fenced and attempt.writes_under_way == 0:
            grant.attempts.remove(attempt)
            self._note(attempt.key)

    def mark_in_place(self, attempt: Attempt, part: TokenRange, extent: Extent = UNDIVIDED) -> bool:
        """All layers and heads of `extent` are written for `part`. Returns whether that committed the attempt.

        While a copy of it is under way, because something is sent twice, it is not committed: the end of that sending
        asks again.

        Raises ReservationGone or AttemptSuperseded if the attempt was fenced first: nothing is committed then.
        """
        if attempt.committed:
            return True
        self._require_live(attempt)
        grant = self._grants[attempt.key]
        attempt.in_place = attempt.in_place.add(part, extent)
        if attempt.writes_under_way or not attempt.in_place.covers(attempt.range, grant.spec.whole):
            return False
        attempt.committed = True
        grant.attempts.remove(attempt)
        grant.committed = grant.committed.add(attempt.range)
        if grant.committed.covers(grant.spec.window):
            # Every further attempt is answered AlreadyCommitted, so the pages are out of reach already and may be
            # used again before the engine's Revoke arrives.
            self._let_go(grant.spec)
        self._note(attempt.key)
        return True

    def end_attempt(self, attempt: Attempt) -> bool:
        """The writer gives up. Returns whether the attempt had been committed, which then stands."""
        grant = self._grants.get(attempt.key)
        if grant is not None and attempt in grant.attempts:
            self._fence(grant, attempt)
        return attempt.committed

    def revoke(self, key: GrantKey) -> bool:
        """Closes a grant for good. Returns whether it is drained already; an unknown one is, and stays so."""
        grant = self._grants.get(key)
        if grant is None:
            self._bury(key, self.last_committed(key))
            return True
        grant.revoked = True
        for attempt in list(grant.attempts):
            attempt.fenced = True
        grant.attempts = [attempt for attempt in grant.attempts if attempt.writes_under_way]
        self._note(key)
        return key not in self._grants

    @property
    def is_idle(self) -> bool:
        """Whether nobody may write anything at present, in any pool."""
        return not any(grant.attempts for grant in self._grants.values())

    def is_drained(self, key: GrantKey) -> bool:
        """Whether nothing is written under this key and nothing ever will be."""
        return key not in self._grants

    def last_committed(self, key: GrantKey) -> RangeSet:
        """What was committed under a drained grant: the last word on it. Nothing if it is unknown or forgotten."""
        return self._tombstones.get(key, RangeSet())

    def keys(self, pool_id: str) -> tuple[GrantKey, ...]:
        """The grants that are open or draining and have pages in a pool."""
        return tuple(
            key for key, grant in self._grants.items() if any(pool.pool_id == pool_id for pool in grant.spec.pools)
        )

    def statuses(self, pool_id: str) -> tuple[GrantStatus, ...]:
        """The condition of every grant whose key names a pool."""
        return tuple(grant.status() for key, grant in self._grants.items() if key.pool_id == pool_id)

    def take_changes(self) -> tuple[GrantStatus, ...]:
        """The newest condition of every grant that changed since the last call."""
        changes = tuple(self._changed.values())
        self._changed.clear()
        return changes

    def forget_pool(self, pool_id: str) -> None:
        """Drops what is remembered of a pool whose engine is new or gone; every grant must be drained."""
        if self.keys(pool_id):
            raise AssertionError("a pool with grants cannot be forgotten")
        for key in [k for k in self._tombstones if k.pool_id == pool_id]:
            del self._tombstones[key]
        for key in [k for k in self._changed if k.pool_id == pool_id]:
            del self._changed[key]
        self._granted_pages.pop(pool_id, None)

    def _find(self, key: GrantKey) -> _Grant:
        grant = self._grants.get(key)
        if grant is None or grant.revoked:
            raise ReservationGone("the reservation has ended")
        return grant

    def _open(self, key: GrantKey, secret: bytes) -> _Grant:
        grant = self._find(key)
        if not hmac.compare_digest(grant.spec.secret, secret):
            raise WrongSecret("the secret is not that of the reservation")
        return grant

    def _require_live(self, attempt: Attempt) -> None:
        grant = self._grants.get(attempt.key)
        if grant is None or grant.revoked:
            raise ReservationGone("the reservation has ended")
        if attempt.fenced or attempt.committed:
            raise AttemptSuperseded("the attempt has ended")

    def _fence(self, grant: _Grant, attempt: Attempt) -> None:
        attempt.fenced = True
        if attempt.writes_under_way == 0:
            grant.attempts.remove(attempt)
        self._note(attempt.key)

    def _note(self, key: GrantKey) -> None:
        grant = self._grants[key]
        status = grant.status()
        self._changed[key] = status
        if status.state is GrantState.DRAINED:
            del self._grants[key]
            if not grant.committed.covers(grant.spec.window):
                self._let_go(grant.spec)
            self._bury(key, grant.committed)

    def _let_go(self, spec: GrantSpec) -> None:
        for pool in spec.pools:
            self._granted_pages[pool.pool_id].difference_update(pool.page_ids)

    def _bury(self, key: GrantKey, committed: RangeSet) -> None:
        self._tombstones[key] = committed
        if len(self._tombstones) > MAX_TOMBSTONES:
            self._tombstones.popitem(last=False)
