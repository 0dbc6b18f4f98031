"""The KV side of a fake engine: what is cached, what is reserved, and the rules that a real engine holds to."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from services.protocol.errors import (
    AttemptSuperseded,
    InvalidRange,
    OutsideWindow,
    RequestIdReused,
    ReservationGone,
    UnknownReservation,
    WrongSecret,
)
from services.protocol.hashes import block_hashes, hash_seed
from services.protocol.ranges import RangeSet, TokenRange

Prompt = tuple[int, ...]


@dataclass(eq=False)
class FakeReservation:
    """Room for KV of prompt[:end]; `over` says how it ended."""

    reservation_id: str
    owner_id: str
    request_id: str
    prompt: Prompt
    salt: str
    window: TokenRange
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(16))
    committed: RangeSet = field(default_factory=RangeSet)
    attempts: dict[TokenRange, int] = field(default_factory=dict)
    attached: bool = False
    num_renewals: int = 0
    over: str = ""
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def filled(self) -> bool:
        return self.committed.covers(self.window)


class FakeKv:
    """Cached blocks and reservations of one engine."""

    def __init__(self, model_digest: bytes, page_size: int, lease_s: float, on_change: Callable[[], None]) -> None:
        self.page_size = page_size
        self.lease_s = lease_s
        self.cached: dict[bytes, None] = {}
        self.reservations: dict[str, FakeReservation] = {}  # all there ever were
        self.on_stored: list[Callable[[list[bytes]], None]] = []
        self._model_digest = model_digest
        self._on_change = on_change
        self._numbers = itertools.count(1)
        self._leases: dict[str, asyncio.TimerHandle] = {}

    @property
    def live(self) -> list[FakeReservation]:
        return [each for each in self.reservations.values() if not each.over]

    def hashes(self, tokens: Sequence[int], salt: str) -> list[bytes]:
        return block_hashes(tokens, self.page_size, hash_seed(self._model_digest, salt))

    def matched(self, tokens: Sequence[int], salt: str) -> int:
        """Tokens of the longest cached prefix, whole pages."""
        hashes = self.hashes(tokens, salt)
        return self.page_size * len(list(itertools.takewhile(self.cached.__contains__, hashes)))

    def publish(self, tokens: Sequence[int], salt: str) -> None:
        """Puts full pages into the prefix cache."""
        new = [each for each in self.hashes(tokens, salt) if each not in self.cached]
        self.cached.update(dict.fromkeys(new))
        for listener in self.on_stored if new else ():
            listener(new)

    def reserve(self, owner_id: str, request_id: str, prompt: Prompt, end: int, salt: str) -> FakeReservation:
        if not 0 <= end <= len(prompt) or not prompt:
            raise InvalidRange(f"end {end} of {len(prompt)} tokens")
        for known in self.reservations.values():
            if (known.owner_id, known.request_id) == (owner_id, request_id):
                if (known.prompt, known.window.end, known.salt) != (prompt, end, salt):
                    raise RequestIdReused("the same id came with other arguments")
                return known
        made = FakeReservation(
            f"reservation-{next(self._numbers)}",
            owner_id,
            request_id,
            prompt,
            salt,
            TokenRange(self.matched(prompt[:end], salt), end),
        )
        self.reservations[made.reservation_id] = made
        self._renew(made)
        self._on_change()
        return made

    def find(self, reservation_id: str, secret: bytes) -> FakeReservation:
        """A live one. UnknownReservation, WrongSecret, ReservationGone."""
        found = self.reservations.get(reservation_id)
        if found is None:
            raise UnknownReservation("never heard of that reservation")
        if found.secret != secret:
            raise WrongSecret("that is not the reservation's secret")
        if found.over:
            raise ReservationGone(f"the reservation was {found.over}")
        return found

    def begin_attempt(self, reservation: FakeReservation, tokens: TokenRange, attempt: int) -> None:
        """A sender begins; lower attempts at the range are fenced off."""
        if not reservation.window.contains(tokens):
            raise OutsideWindow(f"{tokens} is not in {reservation.window}")
        if attempt <= reservation.attempts.get(tokens, 0):
            raise AttemptSuperseded("the number was used before")
        reservation.attempts[tokens] = attempt

    def commit(self, reservation: FakeReservation, tokens: TokenRange, attempt: int) -> None:
        if reservation.over:
            raise ReservationGone(f"the reservation was {reservation.over}")
        if reservation.attempts[tokens] != attempt:
            raise AttemptSuperseded("a later attempt took over")
        reservation.committed = reservation.committed.add(tokens)
        if reservation.filled:
            self.publish(reservation.prompt[: reservation.window.end], reservation.salt)
        self._renew(reservation)
        reservation.changed.set()

    def renew(self, reservation: FakeReservation) -> None:
        reservation.num_renewals += 1
        self._renew(reservation)
        self._on_change()

    def end(self, reservation: FakeReservation, how: str) -> None:
        """It holds nothing any more."""
        if not reservation.over:
            reservation.over = how
            self._leases.pop(reservation.reservation_id).cancel()
            reservation.changed.set()
            self._on_change()

    def expire(self, reservation: FakeReservation) -> None:
        """Its lease is over."""
        if not reservation.attached:
            self.end(reservation, "expired")

    def close(self) -> None:
        for timer in self._leases.values():
            timer.cancel()

    def _renew(self, reservation: FakeReservation) -> None:
        if reservation.reservation_id in self._leases:
            self._leases[reservation.reservation_id].cancel()
        timer = asyncio.get_running_loop().call_later(self.lease_s, self.expire, reservation)
        self._leases[reservation.reservation_id] = timer
