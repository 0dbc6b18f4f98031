"""A reservation of KV pages on a receiver, for as long as a policy needs it."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable

from services.protocol.errors import Code, ReservationGone, ServiceError, UnknownReservation
from services.protocol.ranges import TokenRange
from services.router.cleanup import Cleanup
from services.router.fleet.info import EngineSnapshot
from services.router.fleet.port import EnginePort, ReservedKv
from services.router.fleet.underway import Answer

log = logging.getLogger(__name__)

CALL_TIMEOUT_S = 5.0
_GONE = (Code.NOT_FOUND, Code.ABORTED)


class Reservation:
    """Where the KV of [matched, end) will arrive. Keeps its lease alive until it is used up or released."""

    def __init__(
        self, receiver: EngineSnapshot, kv: ReservedKv, answer: Answer, client: EnginePort, cleanup: Cleanup
    ) -> None:
        self.receiver = receiver
        self.kv = kv
        self.answer = answer
        self._client = client
        self._cleanup = cleanup
        self._attempts: Counter[TokenRange] = Counter()
        self._over = self._is_released = False
        self._needs_lease = True
        self._timer: asyncio.TimerHandle | None = None
        self._renew_after(kv.lease_s)

    def __repr__(self) -> str:
        return f"Reservation({self.kv.reservation_id} on {self.receiver.info.name}, {self.missing})"

    @property
    def matched(self) -> int:
        """Tokens of the prompt that the receiver had cached."""
        return self.kv.window.begin

    @property
    def missing(self) -> TokenRange:
        """What is to be sent: [matched, end), empty if all was cached."""
        return self.kv.window

    def next_attempt(self, tokens: TokenRange) -> int:
        """The number of the next try at sending that range, from 1."""
        self._attempts[tokens] += 1
        return self._attempts[tokens]

    def check(self) -> None:
        """ReservationGone if it was released, which no engine need be asked."""
        if self._is_released:
            raise ReservationGone("the reservation was released before")

    def check_on(self, receiver: str) -> None:
        """As check; UnknownReservation unless it is on the engine at that address."""
        self.check()
        if self.receiver.address != receiver:
            raise UnknownReservation(f"the reservation is on {self.receiver.info.name}")

    def in_use(self) -> None:
        """A sequence decodes on it: its lease matters no more."""
        self._stop_renewing()

    def used_up(self) -> None:
        """The sequence that used it has ended, and the reservation with it."""
        self._over = True
        self._stop_renewing()

    async def release(self, *, publish: bool = False) -> None:
        """Ends it unless it is over; with `publish`, what was filled stays in the receiver's prefix cache.

        Cancelling the caller does not cancel the release, and a receiver that does not answer holds nobody up for long:
        the lease ends it there.
        """
        self._stop_renewing()
        if not self._over:
            self._over = self._is_released = True
            await self._cleanup.run("release", self._release(publish))

    async def _release(self, publish: bool) -> None:
        await _unless_gone(lambda: self._client.release(self.kv, publish=publish, timeout_s=CALL_TIMEOUT_S))

    def _renew_after(self, lease_s: float) -> None:
        if lease_s > 0 and self._needs_lease:
            # A third: two renewals may be lost before the lease is.
            self._timer = asyncio.get_running_loop().call_later(lease_s / 3, self._begin_renewal)

    def _begin_renewal(self) -> None:
        self._timer = None
        self._cleanup.spawn("renew", self._renew())

    async def _renew(self) -> None:
        lease_s = self.kv.lease_s
        try:
            lease_s = await self._client.renew(self.kv, timeout_s=min(CALL_TIMEOUT_S, lease_s / 6))
        except ServiceError as error:
            if error.code in _GONE:
                return
            self._renew_after(lease_s / 2)  # a renewal that is lost is tried again, and soon
            raise
        self._renew_after(lease_s)

    def _stop_renewing(self) -> None:
        self._needs_lease = False  # also where a renewal is under way
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


async def _unless_gone(call: Callable[[], Awaitable[None]]) -> None:
    """A reservation that has ended meanwhile needs neither release nor renewal."""
    try:
        await call()
    except ServiceError as error:
        if error.code not in _GONE:
            raise
