"""The state of the bounded world: plain data, copied and compared by pickling."""

from __future__ import annotations

import io
import pickle
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Self

from services.protocol.extents import Coverage, Extent
from services.protocol.grants import Attempt, GrantKey, GrantSpec, GrantTable, PoolPages
from services.protocol.pages import PageLedger
from services.protocol.ranges import RangeSet, TokenRange
from services.protocol.reservation import Reservation, ReservationState

# The receiver has two ranks with a pool and one of the two KV heads each; the keys of grants name the first.
POOL, SECOND_POOL = "pool", "second pool"
WHOLE = Extent((0, 1), (0, 2))
NUM_PAGES = 3
WINDOW = TokenRange(0, 2)
LEASE = 2
POISON, TORN = "poison", "torn"
# What never changes: states share it, and two that are equal look the same wherever it came from.
VALUES = frozenset(
    {
        str,
        bytes,
        frozenset,
        TokenRange,
        RangeSet,
        Extent,
        Coverage,
        ReservationState,
        GrantKey,
        GrantSpec,
        PoolPages,
    }
)


@dataclass
class Held:
    """What the receiver's engine knows of a reservation."""

    machine: Reservation
    pages: tuple[int, ...]
    secret: bytes
    epoch: int  # of the service that its address names
    grant: str = "asked"  # asked, open, revoking, drained
    quarantined: bool = False
    prep_answered: bool = False
    starting: bool = False  # a StartGenerate waits for it or runs on it
    releasing: bool = False  # a Release that is to publish waits for the fence
    promised: bool = False  # all of it was committed when that Release came


# A copy of one position by one rank.
Copy = tuple[int, Extent]


@dataclass
class Sender:
    """A RemoteSend at one of the sending engines."""

    range: TokenRange
    number: int
    # What its ranks have of every token: together all of it.
    ranks: tuple[Extent, ...] = (WHOLE,)
    alive: bool = True
    asked: bool = False
    attempt: Attempt | None = None
    writing: tuple[Copy, ...] = ()
    done: frozenset[Copy] = frozenset()
    answer: str | None = None


def poisoned(page_count: int) -> list[list[str]]:
    """What pages hold that nobody wrote."""
    return [[POISON] * WHOLE.kv_head_count for _ in range(page_count)]


@dataclass
class Budget:
    """How often each disturbance may still happen."""

    ticks: int = 0
    renewals: int = 0
    aborts: int = 0
    releases: int = 0
    publishes: int = 0
    starts: int = 0
    second_reservation: int = 0
    prep_retries: int = 0
    lost_grant_replies: int = 0
    sender_cancels: int = 0
    sender_deaths: int = 0
    receiver_deaths: int = 0
    service_deaths: int = 0


_values: list[Hashable] = []


class _Numbers(dict[Hashable, int]):
    """The place of each value in _values: the same one for equal values."""

    def __missing__(self, value: Hashable) -> int:
        _values.append(value)
        return self.setdefault(value, len(_values) - 1)


_numbers = _Numbers()


class _Pickler(pickle.Pickler):
    def persistent_id(self, thing: object) -> int | None:
        return _numbers[thing] if type(thing) in VALUES else None


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, number: int) -> Hashable:
        return _values[number]


@dataclass
class WorldState:
    """State of everything; copied by pickling."""

    senders: dict[str, Sender]
    budget: Budget
    clock: int = 0
    ledger: PageLedger = field(default_factory=lambda: PageLedger(NUM_PAGES))
    incarnation: int = 1
    receiver_alive: bool = True
    held: dict[str, Held] = field(default_factory=dict)
    table: GrantTable | None = field(default_factory=GrantTable)
    epoch: int = 1
    known_epoch: int = 1
    connected: bool = True  # the engine believes that it has the service of known_epoch
    content: list[list[str]] = field(default_factory=lambda: poisoned(NUM_PAGES))  # of each head of each page
    calls: tuple[tuple[str, int, int, str], ...] = ()  # (kind, epoch, incarnation, reservation)

    def freeze(self) -> bytes:
        """The state as a value: for comparing and for copying."""
        frozen = io.BytesIO()
        _Pickler(frozen, protocol=pickle.HIGHEST_PROTOCOL).dump(self)
        return frozen.getvalue()

    @classmethod
    def thaw(cls, frozen: bytes) -> Self:
        """A world of its own in that state."""
        world = _Unpickler(io.BytesIO(frozen)).load()
        assert isinstance(world, cls)
        return world

    def reachable(self) -> bool:
        """Whether the engine is connected and the service it is connected to still lives."""
        return self.connected and self.table is not None and self.known_epoch == self.epoch

    def writes(self) -> list[tuple[str, int, int]]:
        """(reservation, page, head) of every copy under way."""
        return [
            (s.attempt.key.reservation_id, self.page_of(s, position), head)
            for s in self.senders.values()
            if s.attempt is not None
            for position, extent in s.writing
            for head in range(*extent.kv_heads)
        ]

    def page_of(self, sender: Sender, position: int) -> int:
        assert sender.attempt is not None
        rid = sender.attempt.key.reservation_id
        pages = self.held[rid].pages
        return pages[position - WINDOW.begin]

    def tick(self) -> None:
        self.clock += 1
