"""The receiving end: asks for piece after piece, receives into a buffer on the GPU, and scatters from there.

Received bytes pass through a buffer for the same reason as over NIXL: a receive that is under way cannot be called back
without an abort, and pages must be free as soon as their grant is fenced.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from services.kvtransfer.errors import TransportFailed
from services.kvtransfer.plan import Piece, Run
from services.kvtransfer.pool import Pool
from services.kvtransfer.transports.base import Unsupported
from services.kvtransfer.transports.cuda_ipc.copies import RunCopier
from services.kvtransfer.transports.cuda_ipc.runs import scatter_runs
from services.kvtransfer.transports.cuda_ipc.staging import Staging
from services.kvtransfer.transports.nccl.buffers import Buffer, Buffers
from services.kvtransfer.transports.nccl.communicator import CommunicatorLost
from services.kvtransfer.transports.nccl.link import NAME, Link, Offer
from services.kvtransfer.transports.nccl.source import places_of, refuses_host
from services.kvtransfer.transports.pull.fetching import ByteRange, Fetch, SourcePool

# Links that stay connected between pushes; the one used longest ago goes first.
MAX_IDLE = 64
# Buffers of one push: one is received into while another one is scattered. A link does one thing at a time anyway.
_BUFFERS_OF_ONE = 2


class NcclSink:
    """A SinkSide. Belongs to the running loop; close it."""

    name = NAME

    def __init__(
        self, buffers: Buffers, copier: RunCopier, staging: Staging, make_link: Callable[[bytes, int], Link]
    ) -> None:
        """`make_link(unique_id, rank)` begins to connect."""
        self._buffers = buffers
        self._copier = copier
        self._staging = staging
        self._make_link = make_link
        self._idle: OrderedDict[bytes, Link] = OrderedDict()
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def buffer_bytes(self) -> int:
        """See SinkSide.buffer_bytes."""
        return self._buffers.buffer_bytes

    def refuses(self, target: Pool) -> Unsupported | None:
        """See SinkSide.refuses."""
        return refuses_host(target)

    def checksum(self, pool: Pool, ranges: Sequence[ByteRange]) -> int:
        """See SinkSide.checksum."""
        return self._staging.checksum(places_of(pool, ranges))

    @asynccontextmanager
    async def connect(self, source: SourcePool, ask: Callable[[Fetch], None]) -> AsyncGenerator[NcclFetcher, None]:
        """See SinkSide.connect. Raises TransportFailed for an offer that is none, too."""
        if self._buffers.are_spent:
            raise TransportFailed("every buffer was lost to a stuck stream: restart this service")
        try:
            link = self._link(Offer.decode(source.offer))
        except ValueError as error:
            raise TransportFailed(str(error)) from None
        fetcher = NcclFetcher(self._buffers, self._copier, link, ask)
        try:
            await link.connected()
            yield fetcher
        except CommunicatorLost as error:
            raise TransportFailed(f"no NCCL communicator with the sender: {error}") from None
        finally:
            if fetcher.is_kept:
                self._idle[link.unique_id] = link
                while len(self._idle) > MAX_IDLE:
                    _, oldest = self._idle.popitem(last=False)
                    self._close(oldest)
            else:
                self._close(link)

    async def close(self) -> None:
        """Aborts every link."""
        for link in self._idle.values():
            self._close(link)
        self._idle.clear()
        await asyncio.gather(*self._closing)

    def _link(self, offer: Offer) -> Link:
        """Raises ValueError for a link of an earlier push that is no more."""
        if offer.is_fresh:
            return self._make_link(offer.unique_id, 1)
        if offer.unique_id not in self._idle:
            raise ValueError("the communicator of an earlier push is gone")
        return self._idle.pop(offer.unique_id)

    def _close(self, link: Link) -> None:
        task = asyncio.create_task(link.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


class NcclFetcher:
    """A Fetcher over a link of its own."""

    def __init__(self, buffers: Buffers, copier: RunCopier, link: Link, ask: Callable[[Fetch], None]) -> None:
        self.is_kept = False
        self._turns = asyncio.Semaphore(_BUFFERS_OF_ONE)
        self._buffers, self._copier, self._link, self._ask = buffers, copier, link, ask

    @asynccontextmanager
    async def fetch(self, layer: int, piece: Piece) -> AsyncGenerator[NcclFetched, None]:
        """See Fetcher.fetch."""

        def start(buffer: Buffer) -> asyncio.Future[None]:
            # Together, so that both sides take the pieces in one order.
            self._ask(Fetch(layer, piece.part))
            return self._link.run(lambda communicator: communicator.receive(buffer.address(), piece.num_bytes))

        async with self._turns, self._buffers.used_by(start) as buffer:
            yield NcclFetched(buffer.address(), self._copier)

    def keep(self) -> None:
        """See Fetcher.keep."""
        self.is_kept = True


@dataclass(frozen=True, slots=True)
class NcclFetched:
    """Fetched bytes in a buffer on the GPU."""

    buffer: int
    copier: RunCopier

    def place(self, pool: Pool, layer: int, runs: Sequence[Run]) -> None:
        """See Fetched.place."""
        shape, address = pool.shape, pool.device_address
        assert address is not None
        self.copier.copy(scatter_runs(layer, runs, shape.layout, shape.page_count), address, self.buffer)
