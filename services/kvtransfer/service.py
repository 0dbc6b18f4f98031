"""The KV transfer service without its wire: every verb of KvTransferService as a method."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace

from prometheus_client import CollectorRegistry

from services.kvtransfer.books import Books, PoolCount, Stats, StatsCollector
from services.kvtransfer.config import KvTransferConfig
from services.kvtransfer.copier import Copier
from services.kvtransfer.errors import Draining
from services.kvtransfer.gate import Gate
from services.kvtransfer.landing import Claim, Landings
from services.kvtransfer.links import Links
from services.kvtransfer.pool import Pool, PoolShape
from services.kvtransfer.pool_table import PoolEvents, PoolTable
from services.kvtransfer.push import Push
from services.kvtransfer.pushes import Pushes, PushOrder
from services.kvtransfer.transports.base import Peer, Transport
from services.kvtransfer.transports.cuda_ipc.gpu import open_gpu
from services.kvtransfer.transports.cuda_ipc.transport import CudaIpcTransport
from services.kvtransfer.transports.pull.probing import PullProbes
from services.kvtransfer.transports.pull.pulling import Pulling
from services.kvtransfer.transports.pull.session import PullSessions
from services.kvtransfer.transports.shm import ShmTransport
from services.kvtransfer.transports.tcp.transport import TcpConfig, TcpTransport
from services.kvtransfer.transports.tcp.wire import MAX_PUT_BYTES
from services.kvtransfer.watch import GrantBatch, GrantFeeds
from services.protocol.address import KvAddress
from services.protocol.errors import LayoutMismatch
from services.protocol.extents import covers
from services.protocol.grants import GrantKey, GrantSpec
from services.protocol.ranges import RangeSet

EPOCH_BYTES = 16


@dataclass(frozen=True, slots=True)
class Attachment:
    """Where an engine fetches its pool."""

    socket_path: str
    ticket: bytes
    endpoint: str
    ready_slot_count: int


class KvTransfer:
    """One incarnation of the service. Make it inside the running loop, and close it."""

    def __init__(
        self,
        config: KvTransferConfig,
        endpoint: Callable[[], str],
        ask: Callable[[str], Awaitable[Peer]],
        registry: CollectorRegistry | None = None,
    ) -> None:
        """`endpoint` tells the address that others reach the service at, once it is bound. `ask`: see Links."""
        registry = registry or CollectorRegistry()
        self.epoch = secrets.token_bytes(EPOCH_BYTES)
        self._config = config
        self._endpoint = endpoint
        self._draining = False
        self._loop = asyncio.get_running_loop()
        self._feeds = GrantFeeds()
        self._gate = Gate(config.drain_timeout_s, self._feeds.publish, self._bytes_written)
        self._gpu = gpu = open_gpu(config)
        events = PoolEvents(self._engine_gone, self._drained)
        self._pools = PoolTable(config, self.epoch, events, gpu.driver if gpu is not None else None)
        self._copier = Copier(config.copy_threads)
        landings = Landings(self._gate, self._pools.find)
        self._pulling = Pulling(config, landings, self.epoch, gpu)
        within = (landings, self._copier, self.epoch, config.max_copy_bytes)
        transports: list[Transport] = [ShmTransport(*within, checked=config.checksums)]
        if gpu is not None:
            transports.append(CudaIpcTransport(*within, gpu, checked=config.checksums))
        transports += self._pulling.transports
        if config.data_listen is not None:
            transports.append(TcpTransport(landings, self.epoch, endpoint, _tcp_config(config, config.data_listen)))
        self._links = Links(transports, self.epoch, endpoint, ask)
        self._books = Books(self._links, registry)
        self._pushes = Pushes(self._pools, self._links, self._books, config.push_stall_timeout_s)
        registry.register(StatsCollector(self.stats))

    @property
    def pull_sessions(self) -> PullSessions:
        """The receiving end of transports that pull."""
        return self._pulling.sessions

    @property
    def pull_probes(self) -> PullProbes:
        """What answers the probes of services that would send over them."""
        return self._pulling.probes

    async def create_pool(self, engine_name: str, shape: PoolShape, *, adopt: bool) -> Pool:
        """As PoolTable.create. Raises Draining too."""
        self._require_running()
        return await self._pools.create(engine_name, shape, adopt=adopt)

    async def attach_pool(self, pool_id: str, incarnation: bytes) -> Attachment:
        """As PoolTable.attach. Raises Draining too."""
        self._require_running()
        ticket = await self._pools.attach(pool_id, incarnation)
        return Attachment(self._pools.socket_path, ticket, self._endpoint(), self._config.ready_slot_count)

    def grant(self, incarnation: bytes, spec: GrantSpec) -> None:
        """Opens a window; the pools say what the whole model is.

        Raises StaleIncarnation, InvalidPages, LayoutMismatch, Draining and what GrantTable.open_grant raises.
        """
        self._require_running()
        parts = []
        for granted in spec.pools:
            pool = self._pools.find(granted.pool_id)
            pool.require(incarnation)
            pool.shape.check_pages(granted.page_ids, spec.window)
            parts.append(pool.shape.part)
        whole = parts[0].whole
        if any(part.whole != whole for part in parts) or not covers(whole, (part.extent for part in parts)):
            raise LayoutMismatch("the pools together are not one whole model")
        self._gate.open_grant(replace(spec, whole=whole))

    async def revoke(self, incarnation: bytes, key: GrantKey) -> RangeSet:
        """Closes a window; nothing writes into it when this returns, with what was committed in it.

        Raises StaleIncarnation, NotDrained.
        """
        self._pools.find(key.pool_id).require(incarnation)
        return await self._gate.revoke(key)

    async def push(self, order: PushOrder) -> Push:
        """As Pushes.begin. Raises Draining too."""
        self._require_running()
        return await self._pushes.begin(order)

    async def end_attempt(self, pool_id: str, incarnation: bytes, address: KvAddress, claim: Claim) -> bool:
        """As Pushes.end_attempt."""
        return await self._pushes.end_attempt(pool_id, incarnation, address, claim)

    async def watch_grants(self, pool_id: str, incarnation: bytes) -> AsyncGenerator[GrantBatch, None]:
        """Conditions of the pool's grants: all of them, then every change; ends when the service has drained.

        Raises StaleIncarnation, EngineGone, WatchLagged.
        """
        self._pools.find(pool_id).require(incarnation)
        feed = self._feeds.open(pool_id, self._gate.statuses(pool_id))
        try:
            async with aclosing(feed.batches()) as batches:
                async for batch in batches:
                    yield batch
        finally:
            self._feeds.close(feed)

    def stats(self) -> Stats:
        """Counters since the service began; any thread."""
        pools = tuple(
            PoolCount(
                pool.id,
                pool.engine_name,
                pool.shape.size_bytes,
                pool.engine is not None,
                len(self._gate.statuses(pool.id)),
                self._pushes.count(pool),
                pool.received_bytes,
                pool.sent_bytes,
            )
            for pool in self._pools.all()
        )
        refused = self._books.refused_pushes + self._gate.refused_writes
        transports = tuple(self._books.transports.items())
        return Stats(self.epoch, pools, transports, refused, self._links.unroutable, self._links.all())

    def info(self) -> Peer:
        """What other services need to know of this one."""
        return self._links.own()

    async def lost(self) -> str:
        """Returns, when the service can serve no more, why: its GPU fails as a whole. Without a GPU it never does."""
        if self._gpu is not None:
            return await self._gpu.lost()
        never: asyncio.Future[str] = self._loop.create_future()
        return await never

    async def drain(self) -> None:
        """Begins nothing new and returns when every push has ended, also those that others began to pools of this
        service. Cancelling leaves the rest under way."""
        self._draining = True
        await self._pushes.finish(None)
        await self._gate.idle()
        self._feeds.end()

    async def close(self) -> None:
        """Cuts what is under way and lets go of everything. Engines keep the memory that they map."""
        self._draining = True
        await self._pushes.finish(Draining("the service stopped"))
        self._feeds.end()
        await self._links.close()
        await self._pulling.close()
        self._pools.close()
        self._copier.close()

    def _bytes_written(self) -> None:
        # Many small copies: watchers hear of them together.
        self._loop.call_later(self._config.watch_interval_s, lambda: self._feeds.publish(self._gate.take_progress()))

    def _engine_gone(self, pool: Pool) -> None:
        """See PoolEvents."""
        self._pushes.engine_gone(pool)
        self._gate.fence_pool(pool.id)
        self._feeds.engine_gone(pool.id)

    async def _drained(self, pool: Pool) -> None:
        """See PoolEvents."""
        await self._pushes.drained(pool, self._config.drain_timeout_s)
        await self._gate.forget_pool(pool.id)

    def _require_running(self) -> None:
        if self._draining:
            raise Draining("the service is about to stop")


def _tcp_config(config: KvTransferConfig, listen: str) -> TcpConfig:
    return TcpConfig(
        listen,
        config.data_advertise,
        config.data_connections,
        config.connections_per_peer,
        min(config.max_copy_bytes, MAX_PUT_BYTES),
        config.checksums,
        config.server_tls,
        config.peer_tls,
    )
