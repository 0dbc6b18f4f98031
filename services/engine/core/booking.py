"""A reservation with everything that belongs to it: rules, pages, grant, lease, and who waits for it."""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from services.engine.core.api import Reply, RequestKey, ReservationInfo, ReservationRef
from services.engine.core.blocks import BlockChain
from services.engine.core.custody import Custody
from services.engine.core.timers import Timer
from services.protocol.errors import ServiceError, WrongSecret
from services.protocol.reservation import Reservation, ReservationState


class Grant(Enum):
    """What the transfer service may do under a reservation. NONE if it was not asked, and after it is drained."""

    NONE = "NONE"
    OPENING = "OPENING"
    OPEN = "OPEN"
    CLOSING = "CLOSING"


class Holder(Protocol):
    """The PrepRecv call that a reservation was made for."""

    def opened(self) -> None:
        """The window is open, or needs not be: the address can be given out."""

    def ended(self, error: ServiceError) -> None:
        """The reservation is over, for this reason, or a sequence has it. Called once."""


class KvWaiter(Protocol):
    """A StartGenerate that waits for a reservation to be filled."""

    def kv_filled(self) -> None:
        """Everything has arrived: attach now."""

    def kv_lost(self, error: ServiceError) -> None:
        """The reservation has ended."""


@dataclass(slots=True, eq=False)
class Booking:
    """One reservation. Changed by Reservations only."""

    reservation_id: str
    key: RequestKey
    secret: bytes = field(repr=False)
    chain: BlockChain  # the tokens of prompt[:end]
    num_matched: int  # tokens that were here already
    rules: Reservation
    custody: Custody
    page_ids: tuple[int, ...]  # that were set aside, whoever has them now
    holder: Holder
    grant: Grant = Grant.NONE
    timer: Timer | None = None  # end of the lease, or earlier
    waiter: KvWaiter | None = None
    num_published: int = 0  # tokens of the window in the prefix cache since it was filled
    num_bytes: int = 0  # that peers wrote, as counted by the transfer service
    releases: list[Reply[int]] = field(default_factory=list)  # that wait for the last word on what is committed

    @property
    def end(self) -> int:
        """KV of prompt[:end] is what it is for."""
        return self.rules.window.end

    @property
    def full_blocks(self) -> range:
        """Indices of the blocks that end in the window: what can be published once it is filled."""
        page_size = self.chain.page_size
        return range(self.rules.window.begin // page_size, self.rules.window.end // page_size)

    @property
    def is_open(self) -> bool:
        """Whether a peer may still write into its pages."""
        return self.grant is not Grant.NONE

    @property
    def is_attached(self) -> bool:
        """Whether a sequence has its pages."""
        return self.rules.state is ReservationState.ATTACHED

    def check_secret(self, ref: ReservationRef) -> None:
        """Raises WrongSecret."""
        check_secret(self.secret, ref)

    def info(self, now: float) -> ReservationInfo:
        """For ListReservations."""
        return ReservationInfo(
            reservation_id=self.reservation_id,
            key=self.key,
            state=self.rules.state.value,
            window=self.rules.window,
            committed=self.rules.committed,
            lease_remaining_s=0.0 if self.is_attached else max(0.0, self.rules.expires_at - now),
            page_ids=self.page_ids,
        )


def check_secret(secret: bytes, ref: ReservationRef) -> None:
    """Raises WrongSecret unless the reference proves the right to the reservation."""
    if not hmac.compare_digest(secret, ref.secret):
        raise WrongSecret("The secret is not that of the reservation.")
