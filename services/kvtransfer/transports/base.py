"""What every way of moving pages has in common.

The verbs of a transfer, in order: a transport `refuses` a put or `open`s a lane for it; layers are `post`ed to the lane
as they become ready; `check` tells how far it is; `finish` makes the bytes count; `close` ends it. Puts are one-sided:
the receiving engine takes no part. Whoever owns the receiving pool checks every write against the grant.

Services tell each other once how each of their transports is reached (`offer`); a Peer is what another one told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from services.kvtransfer.landing import Claim
from services.kvtransfer.pool import Pool
from services.protocol.address import KvAddress
from services.protocol.grants import AlreadyCommitted
from services.protocol.ranges import TokenRange

# Of what services tell each other in GetInfo and what their transports say to each other.
PEER_VERSION = 1


class Reach(Enum):
    """How far a transport goes."""

    SAME_SERVICE = "same service"
    NETWORK = "network"


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a transport can do, known before any put. `note`: how it does so on this machine, for people."""

    name: str
    reach: Reach
    note: str = ""


@dataclass(frozen=True, slots=True)
class Peer:
    """A transfer service as it describes itself, or this one. `offers`: what its transports tell of themselves, by
    name; a transport that is missing there cannot be used."""

    endpoint: str
    epoch: bytes
    offers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Unsupported:
    """The answer of a transport that cannot do a put; `why` is a clause for people."""

    why: str


@dataclass(frozen=True, slots=True)
class PutRequest:
    """One contiguous range of tokens, out of `source_page_ids` of `source`, to where `address` says, at `peer`."""

    peer: Peer
    source: Pool
    source_page_ids: tuple[int, ...]
    part: TokenRange
    address: KvAddress
    claim: Claim


@dataclass(frozen=True, slots=True)
class PutProgress:
    """Layers and bytes in place."""

    layers_done: int = 0
    num_bytes: int = 0


class Lane(Protocol):
    """One put under way. Belongs to the loop; blocks nowhere."""

    def post(self, layer_end: int) -> None:
        """The layers before `layer_end` are computed and may be moved. Returns at once."""

    def check(self) -> PutProgress:
        """How far it is. Raises ReservationGone or AttemptSuperseded if it was fenced, or what else went wrong."""

    async def finish(self) -> bool:
        """After the last layer is in place: makes it count. Returns whether that committed the attempt.

        Raises ReservationGone or AttemptSuperseded if it was fenced first.
        """

    async def close(self) -> None:
        """No further copy begins; returns when none is under way, so that the source is read no more.

        Again is no error. Cancelling leaves it closed, but not certain.
        """

    @property
    def num_bytes(self) -> int:
        """Bytes in place so far, also after it was closed."""

    @property
    def busy_s(self) -> float:
        """Seconds spent copying, summed over threads."""


class Transport(Protocol):
    """A way of moving pages."""

    @property
    def capabilities(self) -> Capabilities:
        """What it can do."""

    def offer(self) -> str | None:
        """What other services need to know to reach this one; None: it cannot be reached this way."""

    def refuses(self, source: Pool, address: KvAddress, peer: Peer) -> Unsupported | None:
        """Why it cannot put pages of this pool there, or None if it can."""

    async def probe(self, peer: Peer) -> float | None:
        """Bytes a second to the peer, measured within two seconds; None: not worth measuring.

        Raises TransportFailed.
        """

    async def open(self, request: PutRequest, on_change: Callable[[], None]) -> Lane | AlreadyCommitted:
        """Opens or joins the attempt at the receiver and a lane into it. A superseded attempt writes no more then.

        `on_change` is called on the loop whenever check() has news. Raises what Landings.open raises, and
        TransportFailed if this transport cannot at present: the next best one is tried then. Cancelling opens nothing.
        """

    async def end_attempt(self, peer: Peer, address: KvAddress, claim: Claim) -> bool:
        """Gives an attempt up; a push of it that is still on its way finds its number used. Returns, when nothing of
        it is written any more, whether its range is committed. Raises what Landings.end raises, and TransportFailed."""

    async def close(self) -> None:
        """Lets go of everything. All lanes are closed before."""
