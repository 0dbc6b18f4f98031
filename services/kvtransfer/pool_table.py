"""Owns the pools: makes them, gives them to engines, takes them back, frees them."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from services.kvtransfer.config import KvTransferConfig
from services.kvtransfer.control import ControlPage
from services.kvtransfer.errors import EngineGone, InvalidPool, NoDevice, NoMemory, NotDrained, PoolInUse, UnknownPool
from services.kvtransfer.handover import TICKET_SECONDS, HandoverSocket
from services.kvtransfer.liveness import EngineConnection
from services.kvtransfer.memory import SharedSegment
from services.kvtransfer.pool import Engine, Pool, PoolMemory, PoolShape
from services.protocol.errors import StaleEpoch
from services.rpc.cuda_driver import CudaDriver, CudaFailed
from services.rpc.cuda_memory import DeviceSegment
from services.rpc.fd_passing import Message, send_message
from services.rpc.pool_client import Handover

log = logging.getLogger(__name__)

T = TypeVar("T")

_EPOCH_DIGITS = 12
# The kernel shows at most 249 bytes of a memfd's name, and /proc escapes what is not printable.
_ENGINE_NAME = re.compile(r"[!-~]{1,128}")


@dataclass(frozen=True, slots=True)
class PoolEvents:
    """What others do when an engine goes.

    `engine_gone` fences everything it had and returns at once. `drained` returns when nothing of it is under way any
    more; it raises NotDrained when that takes too long.
    """

    engine_gone: Callable[[Pool], None]
    drained: Callable[[Pool], Awaitable[None]]


class PoolTable:
    """All pools of this incarnation, one an engine name. Belongs to the running loop."""

    def __init__(
        self, config: KvTransferConfig, epoch: bytes, events: PoolEvents, gpu: CudaDriver | None = None
    ) -> None:
        """`gpu`: the one that pools may be in."""
        self._config = config
        self._events = events
        self._gpu = gpu
        self._prefix = epoch.hex()[:_EPOCH_DIGITS] + "-"
        self._pools: dict[str, Pool] = {}
        self._pools_made = 0
        self._timers: dict[Pool, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        # Making, attaching and freeing wait for kernel memory and for drains; one at a time keeps them simple.
        self._changing = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self._handover = HandoverSocket()

    @property
    def socket_path(self) -> str:
        """Where tickets are shown."""
        return self._handover.path

    def all(self) -> tuple[Pool, ...]:
        """The pools, oldest first."""
        return tuple(self._pools.values())

    def find(self, pool_id: str) -> Pool:
        """Raises UnknownPool, or StaleEpoch if another incarnation gave the id."""
        if not pool_id.startswith(self._prefix):
            raise StaleEpoch("the pool id was not given by this incarnation of the service")
        try:
            return self._pools[pool_id]
        except KeyError:
            raise UnknownPool("the service has that pool no longer") from None

    async def create(self, engine_name: str, shape: PoolShape, *, adopt: bool) -> Pool:
        """A pool for that engine; its earlier one, if it has the same shape and no engine.

        Raises InvalidPool, PoolInUse, NoMemory, NotDrained. Cancelling only stops waiting: the pool is made, and kept
        as any pool without an engine.
        """
        if not _ENGINE_NAME.fullmatch(engine_name):
            raise InvalidPool("an engine's name is 1 to 128 printable ASCII characters without spaces")
        if shape.page_count < 1:
            raise InvalidPool("a pool has at least one page")
        if shape.gpu and (self._gpu is None or self._gpu.uuid != shape.gpu):
            raise NoDevice("the service was not started for the GPU that the pool is to be on (--cuda-device)")
        return await self._in_background(self._create(engine_name, shape, adopt))

    async def attach(self, pool_id: str, incarnation: bytes) -> bytes:
        """A ticket for the pool's memory. Whatever an earlier engine had under way has ended when this returns.

        Raises UnknownPool, StaleEpoch, PoolInUse, NotDrained. Cancelling leaves the pool without an engine.
        """
        async with self._changing:
            pool = self.find(pool_id)
            self._require_no_engine(pool)
            self._withdraw(pool)
            await self._events.drained(pool)
            pool.ticket = self._handover.invite(partial(self._connected, pool, incarnation))
            self._keep(pool, max(TICKET_SECONDS, self._config.pool_keep_s))
            return pool.ticket

    def close(self) -> None:
        """Lets go of all memory and connections. Nothing may be under way; engines keep what they map."""
        self._handover.close()
        for timer in self._timers.values():
            timer.cancel()
        for task in self._tasks:
            task.cancel()
        for pool in self._pools.values():
            if pool.engine is not None:
                pool.engine.connection.close()
            if pool.memory is not None:
                pool.memory.close()
        self._pools.clear()

    async def _create(self, engine_name: str, shape: PoolShape, adopt: bool) -> Pool:
        async with self._changing:
            old = next((pool for pool in self._pools.values() if pool.engine_name == engine_name), None)
            if old is not None:
                self._require_no_engine(old)
                if old.shape == shape and (old.memory is None) == adopt:
                    self._keep(old, max(TICKET_SECONDS, self._config.pool_keep_s))
                    return old
                await self._free(old)
            self._pools_made += 1
            pool = Pool(f"{self._prefix}{self._pools_made}", engine_name, shape)
            if not adopt:
                pool.memory = await self._allocate(pool)
            self._pools[pool.id] = pool
            self._keep(pool, max(TICKET_SECONDS, self._config.pool_keep_s))
            fields = {"pool": pool.id, "engine": engine_name, "bytes": shape.size_bytes, "adopt": adopt}
            log.info("pool made", extra={"fields": fields})
            return pool

    async def _allocate(self, pool: Pool) -> PoolMemory:
        size_bytes = pool.shape.size_bytes
        taken_bytes = sum(pool.shape.size_bytes for pool in self._pools.values() if not pool.shape.gpu)
        left_bytes = self._config.pool_limit_bytes - taken_bytes
        if size_bytes > left_bytes and not pool.shape.gpu:
            raise NoMemory(f"the pool needs {size_bytes} bytes, {max(0, left_bytes)} are left of the service's limit")
        control = ControlPage.create(f"microserve-control-{pool.engine_name}", self._config.ready_slot_count)
        name = f"microserve-pool-{pool.engine_name}"
        try:
            # On a thread: the kernel clears a few gigabytes a second.
            pages = await asyncio.to_thread(self._make_pages, name, pool.shape)
        except BaseException:
            control.close()
            raise
        return PoolMemory(pages, control)

    def _make_pages(self, name: str, shape: PoolShape) -> SharedSegment | DeviceSegment:
        """Raises NoMemory. Blocks."""
        if not shape.gpu:
            return SharedSegment.create(name, shape.size_bytes, prefault=self._config.prefault)
        assert self._gpu is not None
        try:
            return DeviceSegment.create(self._gpu, shape.size_bytes)
        except CudaFailed as error:
            raise NoMemory(f"the GPU cannot give {shape.size_bytes} bytes: {error}") from None

    def _connected(self, pool: Pool, incarnation: bytes, connection: EngineConnection, message: Message) -> None:
        """An engine showed the pool's ticket."""
        pool.ticket = None
        if (pool.memory is None) != bool(message.descriptors):
            message.close()
            raise InvalidPool("descriptors are handed back exactly when CreatePool was asked to adopt")
        if pool.memory is None:
            pool.memory = PoolMemory.adopt(pool.shape, message.descriptors, self._gpu if pool.shape.gpu else None)
            passed: tuple[int, ...] = ()
        else:
            control = pool.memory.control
            control.clear()
            passed = (pool.memory.pages.descriptor, control.descriptor, control.eventfd)
        handover = Handover(pool.shape.size_bytes, pool.memory.control.slot_count, pool.shape.gpu)
        try:
            send_message(connection.socket, handover.encode(), passed)
        except OSError:
            raise EngineGone("the engine left before it had its pool") from None
        self._timers.pop(pool).cancel()
        pool.engine = Engine(incarnation, connection)
        connection.watch(partial(self._engine_gone, pool))
        fields = {"pool": pool.id, "engine": pool.engine_name, "process": connection.process_id}
        log.info("engine attached", extra={"fields": fields})

    def _require_no_engine(self, pool: Pool) -> None:
        if pool.engine is None:
            return
        if not pool.engine.connection.is_gone():
            raise PoolInUse(f"the engine {pool.engine_name} is alive")
        # The loop has not come to see it yet.
        self._engine_gone(pool)

    def _engine_gone(self, pool: Pool) -> None:
        if pool.engine is None:
            return
        engine, pool.engine = pool.engine, None
        engine.connection.close()
        log.info("engine gone", extra={"fields": {"pool": pool.id, "engine": pool.engine_name}})
        self._events.engine_gone(pool)
        self._keep(pool, self._config.pool_keep_s)

    def _keep(self, pool: Pool, seconds: float) -> None:
        """Frees the pool after so long, unless an engine comes or this is called again."""
        if pool in self._timers:
            self._timers.pop(pool).cancel()
        self._timers[pool] = self._loop.call_later(seconds, self._expire, pool)

    def _expire(self, pool: Pool) -> None:
        del self._timers[pool]
        self._task(self._free_expired(pool))

    async def _free_expired(self, pool: Pool) -> None:
        async with self._changing:
            # Somebody who held the lock before may have wanted it after all.
            if pool.engine is not None or pool in self._timers or pool.id not in self._pools:
                return
            try:
                await self._free(pool)
            except NotDrained:
                log.warning("pool not freed: a copy is still under way", extra={"fields": {"pool": pool.id}})
                self._keep(pool, self._config.drain_timeout_s)

    async def _free(self, pool: Pool) -> None:
        self._withdraw(pool)
        await self._events.drained(pool)
        del self._pools[pool.id]
        if pool in self._timers:
            self._timers.pop(pool).cancel()
        if pool.memory is not None:
            pool.memory.close()
        log.info("pool freed", extra={"fields": {"pool": pool.id, "engine": pool.engine_name}})

    def _withdraw(self, pool: Pool) -> None:
        if pool.ticket is not None:
            self._handover.withdraw(pool.ticket)
            pool.ticket = None

    def _task(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _in_background(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs to the end even if the caller is cancelled."""
        task = self._task(work)
        await asyncio.wait([task])
        return task.result()
