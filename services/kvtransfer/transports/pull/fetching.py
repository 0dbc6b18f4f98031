"""What a way of fetching bytes from a sender's pool has to offer; transports/pull/puller.py does everything else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from services.kvtransfer.plan import Piece, Run, spans
from services.kvtransfer.pool import Pool
from services.kvtransfer.transports.base import Unsupported
from services.protocol.layout import PageLayout
from services.protocol.ranges import TokenRange


@dataclass(frozen=True, slots=True)
class SourcePool:
    """The sender's pool as the receiver knows it. `offer` is Served.offer."""

    layout: PageLayout
    page_count: int
    offer: bytes


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes of a pool: offset and length."""

    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Fetch:
    """What a transport asks the sending service to send: a part of one layer, in the order of byte_ranges_of."""

    layer: int
    part: TokenRange


class Fetched(Protocol):
    """Bytes of the source in a buffer of the receiving service."""

    def place(self, pool: Pool, layer: int, runs: Sequence[Run]) -> None:
        """Copies them to the target side of `runs`; returns when they are there. Any thread."""


class Fetcher(Protocol):
    """Fetches out of one source pool, for one pull."""

    def fetch(self, layer: int, piece: Piece) -> AbstractAsyncContextManager[Fetched]:
        """Inside, the source side of the piece. Raises PeerLost.

        Cancelling leaves a buffer that nobody else gets before it is written no more.
        """

    def keep(self) -> None:
        """The pull ended well on both sides: what connects them may be used again."""


class SinkSide(Protocol):
    """The receiving end of a transport that pulls."""

    @property
    def name(self) -> str:
        """The transport's."""

    @property
    def buffer_bytes(self) -> int:
        """The most that one fetch may bring."""

    def refuses(self, target: Pool) -> Unsupported | None:
        """Why it cannot bring anything into this pool, or None if it can."""

    def checksum(self, pool: Pool, ranges: Sequence[ByteRange]) -> int:
        """XXH3 of bytes of a pool that is not refused, in the order given. Blocks while it reads; any thread. Raises
        DeviceFailed."""

    def connect(self, source: SourcePool, ask: Callable[[Fetch], None]) -> AbstractAsyncContextManager[Fetcher]:
        """Inside, the source can be fetched from; `ask` reaches Served.send. Raises TransportFailed."""


class Served(Protocol):
    """A pool that can be fetched from, for one push."""

    @property
    def offer(self) -> bytes:
        """What SinkSide.connect must know."""

    async def send(self, ranges: Sequence[ByteRange]) -> None:
        """What the receiver asked for. Raises PeerLost."""

    def keep(self) -> None:
        """See Fetcher.keep."""


class SourceSide(Protocol):
    """The sending end of a transport that pulls."""

    @property
    def name(self) -> str:
        """The transport's."""

    def refuses(self, source: Pool) -> Unsupported | None:
        """Why nothing can be fetched from this pool, or None if it can."""

    def checksum(self, pool: Pool, ranges: Sequence[ByteRange]) -> int:
        """As SinkSide.checksum."""

    def serve(self, pool: Pool, endpoint: str) -> AbstractAsyncContextManager[Served]:
        """Inside, the service at `endpoint` can fetch from the pool. Raises TransportFailed."""


def byte_ranges_of(layer: int, runs: Sequence[Run], layout: PageLayout, page_count: int) -> list[ByteRange]:
    """Where the source side of a piece lies in its pool, in the order in which they are fetched."""
    return [
        ByteRange(offset, num_bytes)
        for run in runs
        for offset, num_bytes in spans(layer, run.source_pages, run.source_tokens, layout, page_count)
    ]
