"""What is remembered of reservations that are over, for those who ask late."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from services.engine.core.api import ReservationRef
from services.engine.core.booking import Booking, check_secret


@dataclass(frozen=True, slots=True)
class _Ended:
    secret: bytes = field(repr=False)
    num_published: int


class EndedReservations:
    """The newest `capacity` of them."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._ended: OrderedDict[str, _Ended] = OrderedDict()

    def add(self, booking: Booking, num_published: int) -> None:
        """A reservation is over; so many of its tokens were published."""
        self._ended[booking.reservation_id] = _Ended(booking.secret, num_published)
        if len(self._ended) > self._capacity:
            self._ended.popitem(last=False)

    def num_published(self, ref: ReservationRef) -> int | None:
        """Tokens that an ended reservation published; None if it has not ended or is forgotten. Raises WrongSecret."""
        ended = self._ended.get(ref.reservation_id)
        if ended is None:
            return None
        check_secret(ended.secret, ref)
        return ended.num_published
