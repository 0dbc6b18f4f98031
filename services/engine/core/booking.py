"""One PrepRecv, from its arrival to the last page that its reservation had."""

from __future__ import annotations

import hmac
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from services.engine.core.account import Account
from services.engine.core.api import PrepRecv, ReservationInfo, ReservationRef
from services.engine.core.blocks import BlockChain
from services.engine.core.custody import Custody
from services.engine.core.timers import Timer
from services.protocol.errors import ServiceError, WrongSecret
from services.protocol.reservation import Reservation, ReservationState

if TYPE_CHECKING:
    from services.engine.core.reservations import Reservations


class Grant(Enum):
    """What the transfer service may do under the reservation. NONE before it was asked and after it is drained."""

    NONE = "NONE"
    OPENING = "OPENING"
    OPEN = "OPEN"
    CLOSING = "CLOSING"


class KvWaiter(Protocol):
    """A StartGenerate that waits for a reservation to be filled."""

    def kv_filled(self) -> None:
        """Everything has arrived: attach now."""

    def kv_lost(self, error: ServiceError) -> None:
        """The reservation has ended."""


class Booking:
    """A PrepRecv that waits for pages (`rules` None) or has a reservation. Changed by Reservations only."""

    def __init__(self, desk: Reservations, command: PrepRecv, chain: BlockChain, account: Account, secret: bytes) -> None:
        self._desk = desk
        self.command = command
        self.reservation_id = ""
        self.secret = secret
        self.chain = chain  # the tokens of prompt[:end]
        self.account = account
        self.num_callers = 1
        self.replies = [command.reply]  # not answered yet
        self.refusal: ServiceError | None = None  # it came to nothing: a retry may try again
        self.rules: Reservation | None = None
        self.custody: Custody | None = None
        self.grant = Grant.NONE
        self.timer: Timer | None = None  # end of the wait for pages, then of the lease
        self.waiter: KvWaiter | None = None
        self.num_bytes = 0

    @property
    def end(self) -> int:
        """KV of prompt[:end] is what it is for."""
        return self.command.end

    @property
    def num_matched(self) -> int:
        """Tokens that were here already."""
        return self.account.matched_tokens

    @property
    def is_open(self) -> bool:
        """Whether a peer may still write into its pages."""
        return self.grant is not Grant.NONE

    @property
    def is_attached(self) -> bool:
        """Whether a sequence has its pages."""
        return self.rules is not None and self.rules.state is ReservationState.ATTACHED

    def check_secret(self, ref: ReservationRef) -> None:
        """Raises WrongSecret."""
        if not hmac.compare_digest(self.secret, ref.secret):
            raise WrongSecret("The secret is not that of the reservation.")

    def cancel(self) -> None:
        """One of the callers is gone; when all are, nobody has the address."""
        self.num_callers -= 1
        if self.num_callers <= 0:
            self._desk.abort(self)

    def abort(self) -> None:
        """Ends the reservation unless a sequence has it."""
        self._desk.abort(self)

    def info(self, rules: Reservation, now: float) -> ReservationInfo:
        """For ListReservations."""
        return ReservationInfo(
            reservation_id=self.reservation_id,
            key=self.command.key,
            state=rules.state.value,
            window=rules.window,
            committed=rules.committed,
            lease_remaining_s=0.0 if self.is_attached else max(0.0, rules.expires_at - now),
            page_ids=self.custody.own if self.custody else (),
        )
