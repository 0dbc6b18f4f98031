"""Reservations of this engine as a receiver, from the moment pages are set aside to the moment none is left.

The rules are services/protocol/reservation.py; here are their effects: pages, grants, leases, and who is told.
"""

from __future__ import annotations

import secrets
from collections import Counter

from services.engine.core import api
from services.engine.core.admission import check_lease
from services.engine.core.blocks import BlockChain
from services.engine.core.booking import Booking, Grant, Holder
from services.engine.core.context import Context
from services.engine.core.ended import EndedReservations
from services.engine.core.ports import GrantSpec
from services.engine.core.reserving import Reserver
from services.engine.errors import RequestCancelled, TransferServiceGone
from services.protocol.errors import ReservationGone, ServiceError, UnknownReservation
from services.protocol.ranges import RangeSet, TokenRange
from services.protocol.reservation import UNATTACHED, UNFILLED, Reservation, ReservationState

_ID_BYTES, _SECRET_BYTES = 8, 16


class Reservations:
    """Owns all bookings. Verbs return their answers and raise their refusals."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._reserver = Reserver(context)
        self._bookings: dict[str, Booking] = {}  # neither over nor, if over, drained; oldest first
        self._ended = EndedReservations(context.config.max_finished_requests)

    @property
    def num_live(self) -> int:
        """Reservations that have not ended."""
        return sum(1 for booking in self._bookings.values() if not booking.rules.ended)

    # --- verbs ------------------------------------------------------------------------------------------------

    def reserve(self, key: api.RequestKey, chain: BlockChain, lease_s: float | None, holder: Holder) -> Booking | None:
        """Sets pages aside for KV of the chain's tokens and has the window opened; None if there is no room.

        The holder hears when the window is open, at once if nothing is missing.
        """
        found = self._reserver.reserve(chain, len(chain.tokens))
        if found is None:
            return None
        custody, num_matched = found
        entropy = secrets.token_bytes(_ID_BYTES + _SECRET_BYTES)  # at once: the call gives the interpreter lock away
        rules = Reservation(TokenRange(num_matched, len(chain.tokens)), self._context.clock(), self._lease_s(lease_s))
        booking = Booking(
            reservation_id=entropy[:_ID_BYTES].hex(),
            key=key,
            secret=entropy[_ID_BYTES:],
            chain=chain,
            num_matched=num_matched,
            rules=rules,
            custody=custody,
            page_ids=custody.own,
            holder=holder,
        )
        self._bookings[booking.reservation_id] = booking
        self._watch_lease(booking)
        return booking

    def open(self, booking: Booking) -> None:
        """Has the window opened for writing; an empty one needs no grant."""
        if not booking.rules.window:
            booking.holder.opened()
            return
        booking.grant = Grant.OPENING
        spec = GrantSpec(booking.reservation_id, booking.secret, booking.rules.window, booking.page_ids)
        self._context.link.port.grant(spec)

    def release(self, command: api.Release) -> None:
        """Ends a reservation and answers the tokens published. Once more, or when a sequence has it, changes nothing.

        What is to be published may be committed without our having heard: then the grant is closed first, and the
        answer comes with that of the fence, or when the lease runs out.
        """
        if (num_published := self._ended.num_published(command.reservation)) is not None:
            command.reply(num_published)
            return
        booking = self._find(command.reservation)
        if booking.is_attached:
            command.reply(0)
            return
        if not booking.releases and not (command.publish and self._may_be_whole(booking)):
            command.reply(self._release(booking, publish=command.publish))
            return
        booking.releases.append(command.reply)
        if len(booking.releases) == 1:
            self._close_grant(booking)
            self._lose_waiter(booking, _released())

    def renew(self, command: api.Renew) -> float:
        """Restarts a lease and returns its length in seconds from now."""
        check_lease(command.lease_s)
        lease_s = self._lease_s(command.lease_s)
        booking = self._find(command.reservation)
        if booking.releases:
            raise _released()
        booking.rules.renew(self._context.clock(), lease_s)
        return lease_s  # the timer that is set finds out: a lease never gets shorter

    def list(self, command: api.ListReservations) -> tuple[api.ReservationInfo, ...]:
        """Live reservations, oldest first, of one owner or of all."""
        now = self._context.clock()
        live = (booking for booking in self._bookings.values() if not booking.rules.ended)
        return tuple(booking.info(now) for booking in live if command.owner_id in ("", booking.key.owner_id))

    def abort(self, booking: Booking) -> None:
        """Ends a reservation for its owner, unless a sequence has it or it is over."""
        if booking.rules.state in UNATTACHED:
            booking.rules.abort()
            self._end(booking, RequestCancelled("The request was cancelled."))

    def fail_all(self, error: ServiceError) -> None:
        """Answers every Release that waits; the engine stops."""
        for booking in self._bookings.values():
            self._answer_releases(booking, error)

    # --- for sequences ----------------------------------------------------------------------------------------

    def find(self, ref: api.ReservationRef) -> Booking:
        """A reservation that a sequence could have. Raises UnknownReservation, WrongSecret or ReservationGone."""
        booking = self._find(ref)
        if booking.is_attached or booking.waiter is not None:
            raise ReservationGone("Another sequence has the reservation.")
        if booking.releases:
            raise _released()
        if booking.rules.expired(self._context.clock()):
            raise ReservationGone("The lease of the reservation ran out.")
        return booking

    def attach(self, booking: Booking) -> tuple[int, ...]:
        """Hands a filled reservation's pages, in token order, to a sequence. Raises ReservationGone."""
        booking.rules.attach(self._context.clock())
        booking.waiter = None
        self._reserver.unpin(booking.custody)
        pages = booking.custody.hand_over(is_open=booking.is_open)
        self._close_grant(booking)
        self._let_go(booking, ReservationGone("A sequence has used the reservation."))
        return pages

    def detach(self, booking: Booking) -> None:
        """The sequence has released the pages."""
        booking.rules.detach()
        booking.custody.sequence_gone()
        self._remember(booking, 0)

    # --- news -------------------------------------------------------------------------------------------------

    def grant_opened(self, news: api.GrantOpened) -> None:
        """The holder may tell; the lease counts from now."""
        booking = self._bookings.get(news.reservation_id)
        if booking is not None and booking.grant is Grant.OPENING:
            booking.grant = Grant.OPEN
            booking.rules.renew(self._context.clock(), booking.rules.lease_s)
            booking.holder.opened()

    def grant_failed(self, news: api.GrantFailed) -> None:
        """Nothing can write into the pages, and nothing will."""
        booking = self._bookings.get(news.reservation_id)
        if booking is not None and booking.grant is Grant.OPENING:
            booking.grant = Grant.NONE
            booking.rules.abort()
            self._end(booking, news.error)

    def grant_progress(self, news: api.GrantProgress) -> None:
        """What is committed, which may be what a sequence waits for."""
        booking = self._bookings.get(news.reservation_id)
        if booking is None:
            return
        booking.num_bytes = max(booking.num_bytes, news.bytes)
        self._progress(booking, news.committed, writing=news.writing)

    def grant_drained(self, news: api.GrantDrained) -> None:
        """Nothing writes into the pages any more: quarantine is over, and what is committed is known for good."""
        booking = self._bookings.get(news.reservation_id)
        if booking is None:
            return
        if booking.releases:
            self._progress(booking, news.committed, writing=False)
        self._drained(booking)

    def service_lost(self) -> None:
        """Nobody can write any more. What is not whole will never be; the rest goes on (rule 9)."""
        for booking in list(self._bookings.values()):
            self._drained(booking)

    def count_users(self, users: Counter[int], quarantined: set[int]) -> None:
        """Adds the pages of all reservations to the books of an audit."""
        for booking in self._bookings.values():
            booking.custody.count_users(users, quarantined)

    # --- effects ----------------------------------------------------------------------------------------------

    def _find(self, ref: api.ReservationRef) -> Booking:
        if self._ended.num_published(ref) is not None:
            raise ReservationGone("The reservation has ended.")
        booking = self._bookings.get(ref.reservation_id)
        if booking is None:
            raise UnknownReservation("No reservation of that id is known.")
        booking.check_secret(ref)
        return booking

    def _lease_s(self, wish: float | None) -> float:
        config = self._context.config
        return min(config.default_lease_s if wish is None else wish, config.max_lease_s)

    def _watch_lease(self, booking: Booking) -> None:
        booking.timer = self._context.timers.at(booking.rules.expires_at, lambda: self._check_lease(booking))

    def _check_lease(self, booking: Booking) -> None:
        if booking.rules.expired(self._context.clock()):
            booking.rules.expire()
            self._end(booking, ReservationGone("The lease of the reservation ran out."))
        elif booking.rules.state in UNATTACHED:
            self._watch_lease(booking)  # it was renewed, by Renew or by writes

    def _may_be_whole(self, booking: Booking) -> bool:
        """Whether the transfer service may have more than it has told of."""
        return (
            booking.rules.state in UNFILLED
            and booking.grant is Grant.OPEN
            and not booking.rules.expired(self._context.clock())
        )

    def _release(self, booking: Booking, *, publish: bool) -> int:
        is_whole = booking.rules.release(self._context.clock())
        num_published = booking.num_published if is_whole and publish else 0
        self._end(booking, _released(), num_published)
        return num_published

    def _progress(self, booking: Booking, committed: RangeSet, *, writing: bool) -> None:
        state = booking.rules.state
        booking.rules.progress(committed, writing, self._context.clock())
        if booking.rules.state is not state:
            self._moved_on(booking)

    def _moved_on(self, booking: Booking) -> None:
        """What arrives is known to those who could use it, and readable once it is whole."""
        waits, chain = self._context.waits, booking.chain
        if booking.rules.state is ReservationState.FILLING:
            waits.arriving.announce(booking.reservation_id, (chain.hash(index) for index in booking.full_blocks))
        elif booking.rules.state is ReservationState.FILLED:
            self._publish(booking)
            if booking.releases:
                self._release(booking, publish=True)
            elif booking.waiter is not None:
                booking.waiter.kv_filled()
        else:
            waits.arriving.withdraw(booking.reservation_id)

    def _publish(self, booking: Booking) -> None:
        """Offers the filled pages to the prefix cache: what is committed is never written again."""
        blocks = booking.full_blocks
        for index in blocks:
            self._context.pool.publish(booking.chain, index, booking.page_ids[index - blocks.start])
            self._context.waits.landed(booking.chain.hash(index))
        self._context.waits.arriving.withdraw(booking.reservation_id)
        booking.num_published = max(0, blocks.stop * booking.chain.page_size - booking.rules.window.begin)

    def _end(self, booking: Booking, error: ServiceError, num_published: int = 0) -> None:
        """Effects of an end that came before any sequence had the pages."""
        self._reserver.unpin(booking.custody)
        self._context.waits.arriving.withdraw(booking.reservation_id)
        booking.custody.give_up(is_open=booking.is_open)
        self._close_grant(booking)
        self._remember(booking, num_published)
        self._let_go(booking, error)
        self._lose_waiter(booking, error)
        self._answer_releases(booking, num_published)

    def _lose_waiter(self, booking: Booking, error: ServiceError) -> None:
        waiter, booking.waiter = booking.waiter, None
        if waiter is not None:
            waiter.kv_lost(ReservationGone(error.message))

    def _answer_releases(self, booking: Booking, answer: int | ServiceError) -> None:
        releases, booking.releases = booking.releases, []
        for reply in releases:
            reply(answer)

    def _let_go(self, booking: Booking, error: ServiceError) -> None:
        """No lease and no holder any more."""
        if booking.timer is not None:
            booking.timer.cancel()
        booking.holder.ended(error)

    def _close_grant(self, booking: Booking) -> None:
        if booking.grant in (Grant.OPENING, Grant.OPEN):
            booking.grant = Grant.CLOSING
            self._context.link.port.revoke(booking.reservation_id)

    def _drained(self, booking: Booking) -> None:
        booking.grant = Grant.NONE
        booking.custody.drained()
        if booking.releases:
            self._release(booking, publish=True)
        elif booking.rules.state in UNFILLED:
            booking.rules.abort()
            self._end(booking, TransferServiceGone("The KV transfer service closed the reservation."))
        self._forget_if_over(booking)

    def _remember(self, booking: Booking, num_published: int) -> None:
        self._ended.add(booking, num_published)
        self._forget_if_over(booking)

    def _forget_if_over(self, booking: Booking) -> None:
        if booking.rules.ended and booking.grant is Grant.NONE:
            self._bookings.pop(booking.reservation_id, None)


def _released() -> ReservationGone:
    return ReservationGone("The reservation was released.")
