"""The sending end: gathers what the receiver asks for and sends it over the push's communicator."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial

from services.kvtransfer.errors import TransportFailed
from services.kvtransfer.pool import Pool
from services.kvtransfer.transports.base import Unsupported
from services.kvtransfer.transports.cuda_ipc.device import Copy
from services.kvtransfer.transports.cuda_ipc.staging import Staging
from services.kvtransfer.transports.nccl.buffers import Buffer, Buffers
from services.kvtransfer.transports.nccl.communicator import Communicator
from services.kvtransfer.transports.nccl.library import NcclFailed
from services.kvtransfer.transports.nccl.link import NAME, Link, Offer
from services.kvtransfer.transports.pull.fetching import ByteRange

# Links that stay connected between pushes, in all and to one service; the service used longest ago loses one first.
MAX_IDLE, MAX_IDLE_OF_ONE = 64, 4
# How long the end of a push waits for an abort. Beyond that the GPU is stuck, and so is what is on it.
_CLOSE_TIMEOUT_S = 30.0


class NcclSource:
    """A SourceSide. Belongs to the running loop; close it."""

    name = NAME

    def __init__(
        self,
        buffers: Buffers,
        staging: Staging,
        new_id: Callable[[], bytes],
        make_link: Callable[[bytes, int], Link],
    ) -> None:
        """`new_id` raises NcclFailed. `make_link(unique_id, rank)` begins to connect."""
        self._buffers = buffers
        self._staging = staging
        self._new_id = new_id
        self._make_link = make_link
        self._idle: OrderedDict[str, list[Link]] = OrderedDict()  # by endpoint
        self._closing: set[asyncio.Task[None]] = set()

    def refuses(self, source: Pool) -> Unsupported | None:
        """See SourceSide.refuses."""
        return refuses_host(source)

    def checksum(self, pool: Pool, ranges: Sequence[ByteRange]) -> int:
        """See SinkSide.checksum."""
        return self._staging.checksum(places_of(pool, ranges))

    @asynccontextmanager
    async def serve(self, pool: Pool, endpoint: str) -> AsyncGenerator[NcclServed, None]:
        """See SourceSide.serve."""
        kept = self._take(endpoint)
        try:
            # On a thread: the first one brings the library's network up.
            link = kept or self._make_link(await asyncio.to_thread(self._new_id), 0)
        except NcclFailed as error:
            raise TransportFailed(str(error)) from None
        assert pool.device_address is not None
        served = NcclServed(self._buffers, link, pool.device_address, Offer(link.unique_id, kept is None).encode())
        try:
            yield served
        except TransportFailed:
            # The receiver may have been replaced: then it knows none of the others either.
            for other in self._idle.pop(endpoint, []):
                self._close(other)
            raise
        finally:
            if served.is_kept and len(self._idle.get(endpoint, ())) < MAX_IDLE_OF_ONE:
                self._keep(endpoint, link)
            else:
                # A call that is under way may read the pool until it is aborted.
                await asyncio.wait([self._close(link)], timeout=_CLOSE_TIMEOUT_S)

    async def close(self) -> None:
        """Aborts every link."""
        links = [link for links in self._idle.values() for link in links]
        self._idle.clear()
        await asyncio.gather(*self._closing, *(link.close() for link in links))

    def _take(self, endpoint: str) -> Link | None:
        links = self._idle.pop(endpoint, [])
        link = links.pop() if links else None
        if links:
            self._idle[endpoint] = links
        return link

    def _keep(self, endpoint: str, link: Link) -> None:
        self._idle.setdefault(endpoint, []).append(link)
        self._idle.move_to_end(endpoint)
        if sum(len(links) for links in self._idle.values()) > MAX_IDLE:
            oldest = next(iter(self._idle))
            other = self._idle[oldest].pop(0)
            if not self._idle[oldest]:
                del self._idle[oldest]
            self._close(other)

    def _close(self, link: Link) -> asyncio.Task[None]:
        task = asyncio.create_task(link.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        return task


class NcclServed:
    """A Served over a link of its own."""

    def __init__(self, buffers: Buffers, link: Link, pool_address: int, offer: bytes) -> None:
        self.offer = offer
        self.is_kept = False
        self._buffers = buffers
        self._link = link
        self._pool_address = pool_address
        # The other side receives in the order in which it asked, so nobody overtakes in the wait for a buffer.
        self._in_order = asyncio.Lock()

    async def send(self, ranges: Sequence[ByteRange]) -> None:
        """See Served.send."""

        def start(buffer: Buffer) -> asyncio.Future[None]:
            return self._link.run(partial(self._send, ranges, buffer))

        async with self._in_order, self._buffers.used_by(start):
            pass

    def keep(self) -> None:
        """See Served.keep."""
        self.is_kept = True

    def _send(self, ranges: Sequence[ByteRange], buffer: Buffer, communicator: Communicator) -> None:
        begin = end = buffer.address()
        copies = []
        for each in ranges:
            copies.append(Copy(end, self._pool_address + each.offset, each.num_bytes))
            end += each.num_bytes
        communicator.send(copies, begin, end - begin)


def places_of(pool: Pool, ranges: Sequence[ByteRange]) -> list[tuple[int, int]]:
    """Address and length of bytes of a pool on the GPU."""
    begin = pool.device_address
    assert begin is not None
    return [(begin + each.offset, each.num_bytes) for each in ranges]


def refuses_host(pool: Pool) -> Unsupported | None:
    """NCCL moves device memory only."""
    return Unsupported("the pool is in host memory") if pool.device_address is None else None
