"""A reservation: pages of a receiver set aside for KV that arrives from peers.

    RESERVED <──> FILLING ──> FILLED ──> ATTACHED ──> RELEASED
        │            │           ├──────────────────> RELEASED   (release: may publish)
        └────────────┴───────────┴──> EXPIRED, ABORTED

Pure state: time is a parameter, effects are the caller's. What is known of the bytes comes from the receiver's own
transfer service (progress), never from the sender.
"""

from __future__ import annotations

from enum import Enum

from services.protocol.errors import ReservationGone
from services.protocol.ranges import RangeSet, TokenRange


class ReservationState(Enum):
    """States of a reservation; the last three are ends."""

    RESERVED = "RESERVED"
    FILLING = "FILLING"
    FILLED = "FILLED"
    ATTACHED = "ATTACHED"
    RELEASED = "RELEASED"
    EXPIRED = "EXPIRED"
    ABORTED = "ABORTED"


_S = ReservationState
UNFILLED = frozenset({_S.RESERVED, _S.FILLING})
UNATTACHED = UNFILLED | {_S.FILLED}
ENDED = frozenset({_S.RELEASED, _S.EXPIRED, _S.ABORTED})
_ALLOWED: dict[ReservationState, frozenset[ReservationState]] = {
    _S.RESERVED: frozenset({_S.FILLING, _S.FILLED, _S.EXPIRED, _S.ABORTED}),
    _S.FILLING: frozenset({_S.RESERVED, _S.FILLED, _S.EXPIRED, _S.ABORTED}),
    _S.FILLED: frozenset({_S.ATTACHED, _S.RELEASED, _S.EXPIRED, _S.ABORTED}),
    _S.ATTACHED: frozenset({_S.RELEASED}),
}


class Reservation:
    """State, committed ranges and lease of one reservation. Times are seconds on the engine's monotonic clock."""

    def __init__(self, window: TokenRange, now: float, lease_s: float) -> None:
        self.window = window
        self.committed = RangeSet()
        self.state = ReservationState.RESERVED if window else ReservationState.FILLED
        self.lease_s = lease_s
        self.expires_at = now + lease_s

    @property
    def ended(self) -> bool:
        """Whether it is over; its pages are then freed, published or in quarantine."""
        return self.state in ENDED

    def expired(self, now: float) -> bool:
        """Whether its lease has run out. An attached reservation lives as long as its sequence."""
        return self.state in UNATTACHED and now >= self.expires_at

    def progress(self, committed: RangeSet, writing: bool, now: float) -> None:
        """Takes in what the transfer service says: everything committed so far, and whether an attempt is live.

        An accepted write renews the lease, as renew() does; after expiry nothing does. News of a reservation that
        ended or is attached change nothing.
        """
        if self.state not in UNATTACHED or self.expired(now):
            return
        self.committed = RangeSet.of((*self.committed, *committed))
        if self.committed.covers(self.window):
            target = ReservationState.FILLED
        else:
            target = ReservationState.FILLING if writing else ReservationState.RESERVED
        if target is not self.state:
            self._move(target)
        if writing or target is ReservationState.FILLED:
            self.expires_at = max(self.expires_at, now + self.lease_s)

    def renew(self, now: float, lease_s: float) -> None:
        """Restarts the lease. Raises ReservationGone after expiry or end; an expired one never comes back."""
        if self.ended or self.expired(now):
            raise ReservationGone("the lease ended before it was renewed")
        self.lease_s = lease_s
        self.expires_at = max(self.expires_at, now + lease_s)

    def attach(self, now: float) -> None:
        """Hands the pages to a sequence. Raises ReservationGone after expiry or end, or if one has them already."""
        if self.state not in UNATTACHED or self.expired(now):
            raise ReservationGone("the reservation has ended or is in use")
        self._move(ReservationState.ATTACHED)

    def detach(self) -> None:
        """The sequence has ended or was preempted."""
        self._move(ReservationState.RELEASED)

    def release(self, now: float) -> bool:
        """Ends it for its owner. Returns whether its content is whole and may be published."""
        if self.state not in UNATTACHED:
            raise ReservationGone("the reservation has ended or is in use")
        if self.expired(now):
            self._move(ReservationState.EXPIRED)
            return False
        whole = self.state is ReservationState.FILLED
        self._move(ReservationState.RELEASED if whole else ReservationState.ABORTED)
        return whole

    def expire(self) -> None:
        """Ends it because its lease ran out."""
        self._move(ReservationState.EXPIRED)

    def abort(self) -> None:
        """Ends it because its owner, its grant or the transfer service is gone."""
        self._move(ReservationState.ABORTED)

    def _move(self, target: ReservationState) -> None:
        if target not in _ALLOWED.get(self.state, frozenset()):
            raise AssertionError(f"a reservation cannot go from {self.state.value} to {target.value}")
        self.state = target
