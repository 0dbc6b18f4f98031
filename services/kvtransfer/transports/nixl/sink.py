"""The receiving end: reads out of a peer's pool into buffers of this service.

Why the receiver reads and the sender does not write: a NIXL write lands in the receiver's memory without its knowledge
and cannot be fenced, while a read belongs to whoever posted it. Why into buffers: a read that is released or whose peer
is removed while it moves is not stopped; its bytes still come when the peer goes on (measured with NIXL 1.5.1 over
UCX's tcp). So a read is followed to its end, and until then it owns a buffer, never a page.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from services.kvtransfer.errors import PeerLost, TransportFailed
from services.kvtransfer.plan import Piece, Run
from services.kvtransfer.pool import Pool
from services.kvtransfer.transports.base import Unsupported
from services.kvtransfer.transports.nixl.library import Agent, NixlFailed, NixlMissing, Read, ReadState, Span
from services.kvtransfer.transports.nixl.poller import Poller
from services.kvtransfer.transports.nixl.source import NAME, Offer, refuses_gpu
from services.kvtransfer.transports.pull.checksums import host_checksum
from services.kvtransfer.transports.pull.fetching import ByteRange, Fetch, SourcePool, byte_ranges_of
from services.kvtransfer.transports.pull.slots import Slots

Buffer = NDArray[np.uint8]  # (buffer_bytes,)

# Buffers in all, made as they are needed. A peer that is stopped holds those of its reads; one that dies while it is
# read from costs them for good.
NUM_BUFFERS = 128
# Source pools that stay connected; connecting takes some 20 ms.
MAX_PEERS = 256


class NixlSink:
    """A SinkSide. Belongs to the running loop."""

    name = NAME

    def __init__(
        self,
        poller: Poller,
        make_agent: Callable[[str], Agent],
        epoch: bytes,
        buffer_bytes: int,
        num_buffers: int = NUM_BUFFERS,
    ) -> None:
        """`make_agent` makes one of that name; it raises NixlMissing."""
        self.buffer_bytes = buffer_bytes
        self._poller = poller
        self._make_agent = lambda: make_agent(epoch.hex())
        self._agent: Agent | None = None
        self._changing = asyncio.Lock()
        self._buffers: Slots[Buffer] = Slots(lambda: np.empty(buffer_bytes, np.uint8), num_buffers)
        self._registered: set[int] = set()
        # Names of peers by metadata, the one used longest ago first, and how many reads and pulls each has.
        self._peers: OrderedDict[bytes, str] = OrderedDict()
        self._users: Counter[str] = Counter()
        # Peers whose connection failed: they must be removed before they are added again.
        self._broken: set[str] = set()

    def refuses(self, target: Pool) -> Unsupported | None:
        """See SinkSide.refuses."""
        return refuses_gpu(target)

    def checksum(self, pool: Pool, ranges: Sequence[ByteRange]) -> int:
        """See SinkSide.checksum."""
        return host_checksum(pool, ranges)

    @asynccontextmanager
    async def connect(self, source: SourcePool, ask: Callable[[Fetch], None]) -> AsyncGenerator[NixlFetcher, None]:
        """See SinkSide.connect. Raises TransportFailed for an offer that is none, too."""
        if self._buffers.are_spent:
            raise TransportFailed("every buffer was lost to a peer that died: restart this service")
        try:
            offer = Offer.decode(source.offer)
            # One who leaves meanwhile must not leave a peer that the library knows and we do not.
            agent, peer = await asyncio.shield(asyncio.ensure_future(self._known(offer.metadata)))
        except (ValueError, NixlMissing, NixlFailed) as error:
            raise TransportFailed(str(error)) from None
        self._users[peer] += 1
        try:
            yield NixlFetcher(self, agent, peer, offer.pool, source)
        finally:
            self._users[peer] -= 1

    @asynccontextmanager
    async def read(self, agent: Agent, peer: str, remote: Sequence[Span]) -> AsyncGenerator[Buffer, None]:
        """Inside, the spans of the peer's memory in a buffer. Raises PeerLost."""
        buffer = await self._buffers.take()
        self._users[peer] += 1
        reading = self._poller.follow(partial(self._post, agent, buffer, peer, remote))
        try:
            # Waiting can be cancelled, the read cannot.
            await asyncio.wait([reading])
            error = reading.exception()
            if error is not None or reading.result() is ReadState.FAILED:
                self._broken.add(peer)
                raise PeerLost(f"the sender's memory cannot be read: {error or 'the connection failed'}")
            yield buffer[: sum(span.num_bytes for span in remote)]
        finally:
            reading.add_done_callback(partial(self._ended, peer, buffer))

    def _post(self, agent: Agent, buffer: Buffer, peer: str, remote: Sequence[Span]) -> Read:
        """On the poller's thread. Raises NixlFailed."""
        if buffer.ctypes.data not in self._registered:
            agent.register(Span(buffer.ctypes.data, buffer.nbytes))
            self._registered.add(buffer.ctypes.data)
        return agent.read(peer, _spread(buffer.ctypes.data, remote), remote)

    def _ended(self, peer: str, buffer: Buffer, reading: asyncio.Future[ReadState]) -> None:
        """The read has ended and its reader has left."""
        self._users[peer] -= 1
        if reading.exception() is None and reading.result() is ReadState.FAILED:
            self._buffers.lose(buffer)
        else:
            self._buffers.give_back(buffer)

    async def _known(self, metadata: bytes) -> tuple[Agent, str]:
        """The agent that reads, and the peer's name. Raises NixlMissing or NixlFailed."""
        async with self._changing:
            if self._agent is None:
                self._agent = await self._poller.call(self._make_agent)
            agent = self._agent
            await self._forget_some(agent)
            if metadata not in self._peers:
                self._peers[metadata] = await self._poller.call(lambda: agent.add_peer(metadata))
            self._peers.move_to_end(metadata)
            peer = self._peers[metadata]
            if peer in self._broken:
                raise NixlFailed("the connection failed and reads over it have not ended yet")
            return agent, peer

    async def _forget_some(self, agent: Agent) -> None:
        """Lets go of peers that nobody reads from: those whose connection failed, and those above MAX_PEERS."""
        for index, (metadata, peer) in enumerate(tuple(self._peers.items())):
            superfluous = index < len(self._peers) - MAX_PEERS
            if not self._users[peer] and (superfluous or peer in self._broken):
                del self._peers[metadata], self._users[peer]
                self._broken.discard(peer)
                await self._poller.call(partial(agent.remove_peer, peer))


class NixlFetcher:
    """A Fetcher out of one pool."""

    def __init__(self, sink: NixlSink, agent: Agent, peer: str, pool: Span, source: SourcePool) -> None:
        self._sink, self._agent, self._peer, self._pool, self._source = sink, agent, peer, pool, source

    @asynccontextmanager
    async def fetch(self, layer: int, piece: Piece) -> AsyncGenerator[NixlFetched, None]:
        """See Fetcher.fetch."""
        ranges = byte_ranges_of(layer, piece.runs, self._source.layout, self._source.page_count)
        remote = [Span(self._pool.address + each.offset, each.num_bytes) for each in ranges]
        async with self._sink.read(self._agent, self._peer, remote) as data:
            yield NixlFetched(data)

    def keep(self) -> None:
        """See Fetcher.keep. Connections are kept for as long as they work."""


@dataclass(frozen=True, slots=True)
class NixlFetched:
    """Fetched bytes, (num_bytes,)."""

    data: Buffer

    def place(self, pool: Pool, layer: int, runs: Sequence[Run]) -> None:
        """See Fetched.place."""
        layout, pages = pool.shape.layout, pool.pages[layer]
        tokens = pages.reshape(-1, 2 * layout.kv_head_count, layout.page_size, layout.token_bytes)
        begin = 0
        for run in runs:
            target = pages[run.target_pages] if run.whole else tokens[run.target_pages, :, run.target_tokens]
            target[...] = self.data[begin : begin + target.size].reshape(target.shape)
            begin += target.size


def _spread(address: int, spans: Sequence[Span]) -> list[Span]:
    """As many spans of the same lengths, one after the other."""
    local = []
    for span in spans:
        local.append(Span(address, span.num_bytes))
        address += span.num_bytes
    return local
