"""What one incarnation of the KV transfer service was asked, and the promise that each request is answered once.

A request is answered by the service, or, when the service's process is known gone, by what that means: nothing is
written or read any more. Nothing else ends a request whose end frees pages: not a timeout, not a failed call.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from services.engine import metrics
from services.engine.core.api import Command, GrantDrained, GrantFailed, GrantOpened, GrantProgress, PushEnded
from services.engine.core.ports import GrantSpec, PushSpec
from services.engine.errors import RequestCancelled, TransferServiceGone
from services.engine.kvlink.client import GrantCondition, PoolRef, PushProgress, TransferClient
from services.protocol.errors import Code, ServiceError
from services.protocol.ranges import RangeSet
from services.rpc.status import RemoteError

log = logging.getLogger(__name__)

_FIRST_RETRY_S = 0.05
_LAST_RETRY_S = 2.0
_RETRY_ADVICE_S = 1.0
_TRANSIENT = frozenset({Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED, Code.UNKNOWN, Code.CANCELLED, Code.INTERNAL})
_NO_PROGRESS = PushProgress(last=False, committed=False, bytes=0, exposed_s=0.0)


class Attachment:
    """Belongs to one event loop. `submit` takes the answers; `on_bug` hears of what must never happen."""

    def __init__(
        self,
        client: TransferClient,
        pool: PoolRef,
        submit: Callable[[Command], None],
        on_bug: Callable[[BaseException], None],
    ) -> None:
        self._client = client
        self._pool = pool
        self._submit = submit
        self._on_bug = on_bug
        # Each task with the answer that it owes if the service dies.
        self._owed: dict[asyncio.Task[None], Command | None] = {}
        self._moving: dict[int, tuple[PushSpec, asyncio.Task[None]]] = {}
        self._received: dict[str, int] = {}  # bytes received, by open grant
        self._opening: set[str] = set()  # grants that are asked for and not revoked
        self._early: dict[str, GrantCondition] = {}  # news of grants whose own reply is still under way
        self._run(self._watch_grants, None)

    def grant(self, spec: GrantSpec) -> None:
        """See KvPort."""
        self._opening.add(spec.reservation_id)
        self._run(lambda: self._grant(spec), GrantFailed(spec.reservation_id, gone()))

    def revoke(self, reservation_id: str) -> None:
        """See KvPort."""
        self._received.pop(reservation_id, None)
        self._opening.discard(reservation_id)
        self._run(lambda: self._revoke(reservation_id), GrantDrained(reservation_id))

    def push(self, spec: PushSpec) -> None:
        """See KvPort."""
        # Known at once: a cancel may come before the task below has run.
        seen = [_NO_PROGRESS]
        moving = asyncio.create_task(self._follow(spec, seen))
        self._moving[spec.push_id] = (spec, moving)
        self._run(lambda: self._push(spec, moving, seen), PushEnded(spec.push_id, 0, False, 0.0, gone()))

    def cancel_push(self, push_id: int) -> None:
        """See KvPort."""
        if (pushing := self._moving.get(push_id)) is not None:
            pushing[1].cancel()

    def cancel_writer(self, writer_id: str) -> None:
        """Stops all pushes of a request at the next page."""
        for spec, moving in self._moving.values():
            if spec.writer_id == writer_id:
                moving.cancel()

    def end_attempt(self, spec: PushSpec) -> None:
        """See KvPort; `spec` is any push of the attempt."""
        self._run(lambda: self._end_attempt_once(spec), None)

    async def lost(self) -> None:
        """The service's process is gone: gives every answer that is owed. Nothing is submitted afterwards."""
        owed = dict(self._owed)
        self._owed.clear()
        for task in (*owed, *(moving for _, moving in self._moving.values())):
            task.cancel()
        await asyncio.gather(*owed, return_exceptions=True)
        for answer in owed.values():
            if answer is not None:
                self._submit(answer)

    def _run(self, work: Callable[[], Awaitable[tuple[Command, ...]]], if_lost: Command | None) -> None:
        async def answer() -> None:
            commands = await work()
            # Without an await in between: a task answers, or is found by lost(), and never both.
            if task in self._owed:
                del self._owed[task]
                for command in commands:
                    self._submit(command)

        task = asyncio.create_task(answer())
        self._owed[task] = if_lost
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_bug(error)

    async def _grant(self, spec: GrantSpec) -> tuple[Command, ...]:
        try:
            await self._client.grant(self._pool, spec)
        except RemoteError as error:
            # It may be open all the same. No one has its secret yet, so the revoke has nothing to wait for.
            await self._until_revoked(spec.reservation_id)
            self._opening.discard(spec.reservation_id)
            return (GrantFailed(spec.reservation_id, _refusal(error)),)
        condition = self._early.pop(spec.reservation_id, None)
        if spec.reservation_id not in self._opening:
            return ()  # revoked meanwhile, and nobody waits for this any more
        self._opening.remove(spec.reservation_id)
        self._received[spec.reservation_id] = 0
        opened = GrantOpened(spec.reservation_id)
        return (opened,) if condition is None else (opened, self._progress(condition))

    async def _revoke(self, reservation_id: str) -> tuple[Command, ...]:
        return (GrantDrained(reservation_id, await self._until_revoked(reservation_id)),)

    async def _until_revoked(self, reservation_id: str) -> RangeSet:
        async for _ in _retries():
            try:
                return await self._client.revoke(self._pool, reservation_id)
            except RemoteError as error:
                _log_retry("revoke", reservation_id, error)
        return RangeSet()

    async def _push(self, spec: PushSpec, moving: asyncio.Task[None], seen: list[PushProgress]) -> tuple[Command, ...]:
        begin = time.monotonic()
        ended = await self._move(spec, moving, seen)
        outcome = "done" if ended.error is None else ended.error.reason
        metrics.PUSH_SECONDS.labels(outcome).observe(time.monotonic() - begin)
        metrics.SENT_BYTES.inc(ended.bytes)
        if ended.error is None:
            metrics.EXPOSED_SECONDS.observe(ended.exposed_s)
        return (ended,)

    async def _move(self, spec: PushSpec, moving: asyncio.Task[None], seen: list[PushProgress]) -> PushEnded:
        try:
            await asyncio.wait([moving])
        finally:
            del self._moving[spec.push_id]
            moving.cancel()
        progress = seen[-1]
        error: ServiceError = RequestCancelled("The push was cancelled.")
        if not moving.cancelled() and (failure := moving.exception()) is not None:
            if not isinstance(failure, RemoteError):
                raise failure
            error = failure
        elif progress.last:
            return PushEnded(spec.push_id, progress.bytes, progress.committed, progress.exposed_s, None)
        if moving.cancelled() or not _spoken_by_service(error):
            # The service may still be reading the pages. It has stopped when it says so.
            if await self._until_attempt_ended(spec):
                return PushEnded(spec.push_id, progress.bytes, True, progress.exposed_s, None)
            error = _refusal(error)
        return PushEnded(spec.push_id, progress.bytes, False, 0.0, error)

    async def _follow(self, spec: PushSpec, seen: list[PushProgress]) -> None:
        async for progress in self._client.push(self._pool, spec):
            seen[-1] = progress

    async def _until_attempt_ended(self, spec: PushSpec) -> bool:
        async for _ in _retries():
            try:
                return await self._client.end_attempt(self._pool, spec)
            except RemoteError as error:
                if _spoken_by_service(error) and error.code not in _TRANSIENT:
                    return False
                _log_retry("end attempt", spec.target.reservation_id, error)
        return False

    async def _end_attempt_once(self, spec: PushSpec) -> tuple[Command, ...]:
        try:
            await self._client.end_attempt(self._pool, spec)
        except RemoteError as error:
            log.info("attempt not ended", extra={"fields": {"reason": error.reason}})
        return ()

    async def _watch_grants(self) -> tuple[Command, ...]:
        async for _ in _retries():
            self._early.clear()  # the snapshot that comes first says it all again
            try:
                async for conditions in self._client.watch_grants(self._pool):
                    for condition in conditions:
                        self._take(condition)
            except RemoteError as error:
                _log_retry("watch grants", self._pool.pool_id, error)
        return ()

    def _take(self, condition: GrantCondition) -> None:
        """A drained grant needs no word of its own: the reply to its revoke says the same, and what was committed."""
        if condition.drained:
            self._early.pop(condition.reservation_id, None)
        elif condition.reservation_id in self._received:
            self._submit(self._progress(condition))
        else:
            self._early[condition.reservation_id] = condition

    def _progress(self, condition: GrantCondition) -> GrantProgress:
        before = self._received[condition.reservation_id]
        metrics.RECEIVED_BYTES.inc(max(0, condition.bytes - before))
        self._received[condition.reservation_id] = condition.bytes
        return GrantProgress(condition.reservation_id, condition.committed, condition.writing, condition.bytes)


def gone() -> TransferServiceGone:
    """What a caller hears when the service dies under its request."""
    return TransferServiceGone("The KV transfer service is gone.", retry_delay_s=_RETRY_ADVICE_S)


async def _retries() -> AsyncIterator[None]:
    """Again and again, with growing pauses: only success or the death of the service ends these calls."""
    delay_s = _FIRST_RETRY_S
    while True:
        yield
        await asyncio.sleep(delay_s)
        delay_s = min(2 * delay_s, _LAST_RETRY_S)


def _spoken_by_service(error: ServiceError) -> bool:
    """Whether the service itself answered, and not gRPC for it: only its own errors have reasons of their own."""
    return error.reason != error.code.name


def _refusal(error: ServiceError) -> ServiceError:
    """The error for the verb's caller: an unreachable service is something to wait for."""
    if error.code not in _TRANSIENT or _spoken_by_service(error):
        return error
    return TransferServiceGone(
        f"The KV transfer service does not answer: {error.message}", retry_delay_s=_RETRY_ADVICE_S
    )


def _log_retry(what: str, about: str, error: RemoteError) -> None:
    fields = {"call": what, "about": about, "code": error.code.name, "reason": error.reason}
    log.warning("asking the KV transfer service again", extra={"fields": fields})
