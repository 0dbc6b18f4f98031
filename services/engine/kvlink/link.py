"""KvPort over a KV transfer service that may die and come back.

The unix socket that the pool came over says when the service's process is gone; nothing else does. Then every open
request is answered, the loop thread hears TransferServiceLost, and the pool's descriptors, which survive in this
process with all they hold, are handed to the service's next incarnation.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from services.engine.core.api import (
    Command,
    GrantDrained,
    GrantFailed,
    ListReservations,
    PushEnded,
    RequestKey,
    TransferServiceLost,
    TransferServiceReady,
    writer_id,
)
from services.engine.core.ports import GrantSpec, PushSpec
from services.engine.kvlink.attachment import Attachment, gone
from services.engine.kvlink.client import Invitation, PoolRef, TransferClient
from services.protocol.address import KvAddress
from services.protocol.errors import Code
from services.protocol.layout import PageLayout
from services.protocol.ranges import TokenRange
from services.rpc.cuda_driver import CudaDriver
from services.rpc.errors import StartError
from services.rpc.pool_client import AttachedPool, PoolAttachError, adopt, attach_pool
from services.rpc.status import RemoteError

log = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0
_RETRY_S = 0.2
# Answers to CreatePool and AttachPool that waiting may change: the service starts or drains, or has not noticed yet
# that the engine before this one is dead.
_PASSING = frozenset({"POOL_IN_USE", "NOT_DRAINED", "DRAINING", "STALE_EPOCH", "UNKNOWN_POOL"})
# An owner that cannot exist: names have at least one character that is not this.
_NOBODY = "\0"


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """The pool an engine wants."""

    engine_name: str
    layout: PageLayout
    page_count: int
    # The one whose memory it is to be in; None: host memory.
    gpu: CudaDriver | None = None


class KvLink:
    """Methods of KvPort are called on the loop thread, all others on the event loop that `start` ran on."""

    def __init__(self, client: TransferClient, plan: PoolPlan, on_bug: Callable[[BaseException], None]) -> None:
        self._client = client
        self._plan = plan
        self._on_bug = on_bug
        self._loop = asyncio.get_running_loop()
        self._pool: AttachedPool | None = None
        self._ready: TransferServiceReady | None = None
        self._attachment: Attachment | None = None
        self._submit: Callable[[Command], None] | None = None
        self._lost = asyncio.Event()
        self._supervisor: asyncio.Task[None] | None = None
        self.endpoint = ""
        self.transports: tuple[str, ...] = ()

    async def start(self, timeout_s: float = START_TIMEOUT_S) -> AttachedPool:
        """Makes the pool and maps it. Raises StartError if the service does not give it in time."""
        try:
            async with asyncio.timeout(timeout_s):
                self._ready = await self._attach_until_done()
        except TimeoutError:
            raise StartError(f"the KV transfer service gave no pool within {timeout_s:g} s") from None
        assert self._pool is not None
        return self._pool

    def bind(self, submit: Callable[[Command], None]) -> None:
        """The loop thread takes commands from now on; the first says that the service is ready."""
        self._submit = submit
        self._supervisor = asyncio.create_task(self._supervise())
        self._supervisor.add_done_callback(self._supervisor_ended)

    async def close(self) -> None:
        """Ends the link; by the end of its socket the service knows, and fences whatever is left."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        if self._attachment is not None:
            await self._attachment.lost()
        if self._pool is not None:
            self._loop.remove_reader(self._pool.connection)
            self._pool.close()

    def grant(self, spec: GrantSpec) -> None:
        """See KvPort."""
        self._call(lambda a: a.grant(spec), GrantFailed(spec.reservation_id, gone()))

    def revoke(self, reservation_id: str) -> None:
        """See KvPort."""
        self._call(lambda a: a.revoke(reservation_id), GrantDrained(reservation_id))

    def push(self, spec: PushSpec) -> None:
        """See KvPort."""
        self._call(lambda a: a.push(spec), PushEnded(spec.push_id, 0, False, 0.0, gone()))

    def cancel_push(self, push_id: int) -> None:
        """See KvPort."""
        self._call(lambda a: a.cancel_push(push_id), None)

    def abandon(self, key: RequestKey) -> None:
        """Nobody waits for a RemoteSend any more: its pushes stop at the next page, also while a step computes.

        Called on the event loop. The loop thread hears of it by Cancel, after its step.
        """
        if self._attachment is not None:
            self._attachment.cancel_writer(writer_id(self._client.incarnation, key))

    def end_attempt(self, target: KvAddress, attempt: int, attempt_range: TokenRange, writer_id: str) -> None:
        """See KvPort."""
        spec = PushSpec(0, (), attempt_range, target, attempt, attempt_range, writer_id, None)
        self._call(lambda a: a.end_attempt(spec), None)

    def raise_ready(self, slot: int, layers: int) -> None:
        """See KvPort. Memory and an eventfd; it waits for nobody."""
        assert self._pool is not None
        self._pool.raise_ready(slot, layers)

    def _call(self, use: Callable[[Attachment], None], if_gone: Command | None) -> None:
        def call() -> None:
            if self._attachment is not None:
                use(self._attachment)
            elif if_gone is not None and self._submit is not None:
                self._submit(if_gone)

        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call)

    async def _supervise(self) -> None:
        while True:
            await self._serve()
            await self._after_loss()
            self._ready = await self._attach_until_done()

    async def _serve(self) -> None:
        """From an attached pool to the service's death."""
        ready, submit = self._ready, self._submit
        assert ready is not None
        assert submit is not None
        submit(ready)
        pool = PoolRef(ready.pool_id, ready.epoch)
        self._attachment = Attachment(self._client, pool, submit, self._on_bug)
        await self._lost.wait()

    async def _after_loss(self) -> None:
        """Settles what the dead incarnation was asked, and returns when the loop thread knows of its death."""
        log.warning("the KV transfer service is gone")
        attachment, submit = self._attachment, self._submit
        assert attachment is not None
        assert submit is not None
        self._attachment = None
        await attachment.lost()
        submit(TransferServiceLost())
        # What the loop thread asked before it heard of the loss must not reach the next incarnation. The answer to a
        # command behind TransferServiceLost comes after all of that.
        told: asyncio.Future[None] = self._loop.create_future()
        submit(ListReservations(_NOBODY, lambda _: self._tell(told)))
        await told

    def _tell(self, told: asyncio.Future[None]) -> None:
        def tell() -> None:
            if not told.done():
                told.set_result(None)

        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(tell)

    async def _attach_until_done(self) -> TransferServiceReady:
        """Tries for as long as waiting can help. Raises StartError if it cannot and nothing was attached before."""
        said = ""
        while True:
            try:
                return await self._attach()
            except (RemoteError, PoolAttachError) as error:
                passing = isinstance(error, PoolAttachError) or _is_passing(error)
                if not passing and self._pool is None:
                    raise StartError(f"the KV transfer service refuses a pool: {error}") from None
                if str(error) != said:
                    said = str(error)
                    log.warning("waiting for the KV transfer service", extra={"fields": {"why": said}})
            # The channel reconnects in its own time; this only keeps refusals from coming in a rush.
            await asyncio.sleep(_RETRY_S)

    async def _attach(self) -> TransferServiceReady:
        plan = self._plan
        first = self._pool is None
        gpu = plan.gpu.uuid if plan.gpu is not None else b""
        ref = await self._client.create_pool(plan.engine_name, plan.layout, plan.page_count, gpu, adopt=not first)
        invitation = await self._client.attach_pool(ref)
        self.transports = await self._client.transports()
        pool = await self._take(invitation)
        self._lost = asyncio.Event()
        self._loop.add_reader(pool.connection, self._readable)
        self.endpoint = invitation.endpoint
        log.info("pool attached", extra={"fields": {"pool": ref.pool_id, "adopted": not first}})
        return TransferServiceReady(invitation.endpoint, ref.pool_id, ref.epoch, len(pool.control))

    async def _take(self, invitation: Invitation) -> AttachedPool:
        """Maps the pool, or hands back the one that is mapped; both block on the service."""
        if self._pool is None:
            self._pool = await asyncio.to_thread(attach_pool, invitation.socket_path, invitation.ticket, self._plan.gpu)
        else:
            await asyncio.to_thread(adopt, self._pool, invitation.socket_path, invitation.ticket)
        return self._pool

    def _readable(self) -> None:
        assert self._pool is not None
        if self._pool.service_is_gone():
            self._loop.remove_reader(self._pool.connection)
            self._lost.set()

    def _supervisor_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_bug(error)


def _is_passing(error: RemoteError) -> bool:
    return error.reason in _PASSING or error.code in (Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED)
