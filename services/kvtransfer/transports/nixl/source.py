"""The sending end: pools of this service as NIXL peers may read them."""

from __future__ import annotations

import asyncio
import struct
import weakref
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from services.kvtransfer.errors import PeerLost, TransportFailed
from services.kvtransfer.pool import Pool
from services.kvtransfer.transports.base import Unsupported
from services.kvtransfer.transports.nixl.library import Agent, NixlFailed, NixlMissing, Span
from services.kvtransfer.transports.nixl.poller import Poller
from services.kvtransfer.transports.pull.checksums import host_checksum
from services.kvtransfer.transports.pull.fetching import ByteRange

NAME = "nixl"
_HEAD = struct.Struct("!4sQQ")
_MAGIC = b"MSN1"


@dataclass(frozen=True, slots=True)
class Offer:
    """What a receiver must know to read a pool: where it lies in the sender's memory, and the agent's metadata."""

    pool: Span
    metadata: bytes

    def encode(self) -> bytes:
        """The bytes in PullOpen.offer."""
        return _HEAD.pack(_MAGIC, self.pool.address, self.pool.num_bytes) + self.metadata

    @classmethod
    def decode(cls, data: bytes) -> Offer:
        """Raises ValueError if it is none."""
        if len(data) <= _HEAD.size or data[:4] != _MAGIC:
            raise ValueError("no offer of this version of the transport")
        _, address, num_bytes = _HEAD.unpack_from(data)
        return cls(Span(address, num_bytes), data[_HEAD.size :])


@dataclass(frozen=True, slots=True)
class NixlServed:
    """A Served whose receiver needs nobody's help."""

    offer: bytes

    async def send(self, ranges: Sequence[ByteRange]) -> None:
        """See Served.send. A receiver that asks is no receiver of this transport."""
        raise PeerLost("a receiver that reads by itself asked to be sent something")

    def keep(self) -> None:
        """See Served.keep. Connections are the library's."""


def refuses_gpu(pool: Pool) -> Unsupported | None:
    """Only host memory is registered with the library so far."""
    return None if pool.device_address is None else Unsupported("the pool is in memory of a GPU")


class NixlSource:
    """A SourceSide. Each pool has an agent of its own, made with its first push, so that metadata never changes."""

    name = NAME

    def __init__(self, poller: Poller, make_agent: Callable[[str], Agent], epoch: bytes) -> None:
        """`make_agent` makes one of that name; it raises NixlMissing. `epoch` makes the names unique."""
        self._poller = poller
        self._make_agent = make_agent
        self._epoch = epoch
        self._registering = asyncio.Lock()
        self._offers: weakref.WeakKeyDictionary[Pool, tuple[Agent, Offer]] = weakref.WeakKeyDictionary()

    def refuses(self, source: Pool) -> Unsupported | None:
        """See SourceSide.refuses."""
        return refuses_gpu(source)

    def checksum(self, pool: Pool, ranges: Sequence[ByteRange]) -> int:
        """See SinkSide.checksum."""
        return host_checksum(pool, ranges)

    @asynccontextmanager
    async def serve(self, pool: Pool, endpoint: str) -> AsyncGenerator[NixlServed, None]:
        """See SourceSide.serve."""
        # One who leaves meanwhile must not leave an agent that nobody owns.
        agent, offer = await asyncio.shield(asyncio.ensure_future(self._registered(pool)))
        self._poller.watch(agent, 1)
        try:
            yield NixlServed(offer.encode())
        finally:
            self._poller.watch(agent, -1)

    async def _registered(self, pool: Pool) -> tuple[Agent, Offer]:
        async with self._registering:  # a second agent of the name would be refused by who knows the first
            return self._offers.get(pool) or await self._register(pool)

    async def _register(self, pool: Pool) -> tuple[Agent, Offer]:
        memory = pool.pages
        span = Span(memory.ctypes.data, memory.nbytes)

        def register() -> tuple[Agent, Offer]:
            agent = self._make_agent(f"{self._epoch.hex()}/{pool.id}")
            agent.register(span)
            return agent, Offer(span, agent.metadata())

        try:
            agent, offer = await self._poller.call(register)
        except (NixlMissing, NixlFailed) as error:
            raise TransportFailed(str(error)) from None
        self._offers[pool] = agent, offer
        # The mapping must outlive the agent, so the finalizer holds it.
        weakref.finalize(pool, _forget, self._poller, agent, memory).atexit = False
        return agent, offer


def _forget(poller: Poller, agent: Agent, memory: object) -> None:
    poller.forget(agent, memory)
