"""The gate that every write passes: GrantTable under one lock, with waiting for copies that are under way.

Threads that copy call begin_write and end_write; everything else belongs to the loop. No method holds the lock over an
await.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from services.kvtransfer.errors import NotDrained
from services.protocol.errors import ServiceError
from services.protocol.extents import UNDIVIDED, Extent
from services.protocol.grants import (
    AlreadyCommitted,
    Attempt,
    Draining,
    GrantKey,
    GrantSpec,
    GrantStatus,
    GrantTable,
)
from services.protocol.ranges import RangeSet, TokenRange

# How soon a caller may ask again when a copy did not end within the bound.
_RETRY_DELAY_S = 0.1


class Gate:
    """Who may write where.

    `on_changes` is called on the loop with the newest condition of grants that changed, and `on_progress` when bytes
    were written for the first time since take_progress.
    """

    def __init__(
        self,
        drain_timeout_s: float,
        on_changes: Callable[[tuple[GrantStatus, ...]], None],
        on_progress: Callable[[], None],
    ) -> None:
        self._table = GrantTable()
        self._lock = threading.Lock()
        self._loop = asyncio.get_running_loop()
        self._drain_timeout_s = drain_timeout_s
        self._on_changes = on_changes
        self._on_progress = on_progress
        self._progressed: set[GrantKey] = set()
        # Futures of callers that wait until a fenced copy has ended. Changed under the lock.
        self._waiting: set[asyncio.Future[None]] = set()
        self._fence_listeners: dict[Attempt, set[Callable[[], None]]] = {}
        self.refused_writes = 0

    def begin_write(self, attempt: Attempt, part: TokenRange) -> None:
        """A copy into `part` begins; any thread. Raises ReservationGone or AttemptSuperseded if it must not."""
        with self._lock:
            try:
                self._table.begin_write(attempt, part)
            except ServiceError:
                self.refused_writes += 1
                raise

    def end_write(self, attempt: Attempt, num_bytes: int) -> None:
        """The copy has ended; any thread."""
        with self._lock:
            self._table.end_write(attempt, num_bytes)
            drained = attempt.fenced and attempt.writes_under_way == 0
            first = not self._progressed
            self._progressed.add(attempt.key)
        if drained:
            self._loop.call_soon_threadsafe(self._settle)
        if first:
            self._loop.call_soon_threadsafe(self._on_progress)

    def open_grant(self, spec: GrantSpec) -> None:
        """As GrantTable.open_grant."""
        with self._lock:
            self._table.open_grant(spec)
        self._settle()

    def check(self, key: GrantKey, secret: bytes) -> GrantSpec:
        """As GrantTable.check."""
        with self._lock:
            return self._table.check(key, secret)

    def check_proof(self, key: GrantKey, challenge: bytes, proof: bytes) -> GrantSpec:
        """As GrantTable.check_proof."""
        with self._lock:
            return self._table.check_proof(key, challenge, proof)

    async def open_attempt(
        self, key: GrantKey, secret: bytes, claimed: TokenRange, number: int, writer_id: str
    ) -> Attempt | AlreadyCommitted:
        """As GrantTable.open_attempt, but returns only when a predecessor writes no more.

        Cancelling leaves the predecessor fenced and opens nothing. Raises NotDrained when it takes too long.
        """
        opened: list[Attempt | AlreadyCommitted] = []

        def try_open() -> bool:
            answer = self._table.open_attempt(key, secret, claimed, number, writer_id)
            if not isinstance(answer, Draining):
                opened.append(answer)
            return bool(opened)

        await self._until(try_open, self._drain_timeout_s)
        return opened[0]

    def refusal(self, attempt: Attempt) -> ServiceError | None:
        """Why the attempt may write no more, or None while it may."""
        nothing = TokenRange(attempt.range.begin, attempt.range.begin)
        with self._lock:
            try:
                self._table.begin_write(attempt, nothing)
            except ServiceError as error:
                return error
            self._table.end_write(attempt, 0)
        return None

    def begin_part(self, attempt: Attempt, part: TokenRange, extent: Extent) -> None:
        """As GrantTable.begin_part."""
        with self._lock:
            self._table.begin_part(attempt, part, extent)

    def mark_in_place(self, attempt: Attempt, part: TokenRange, extent: Extent = UNDIVIDED) -> bool:
        """As GrantTable.mark_in_place."""
        with self._lock:
            committed = self._table.mark_in_place(attempt, part, extent)
        self._settle()
        return committed

    async def end_attempt(self, key: GrantKey, secret: bytes, claimed: TokenRange, number: int, writer_id: str) -> bool:
        """Ends an attempt and waits for its copies. Returns whether its range is committed, which then stands.

        An attempt that is not open is opened and ended, so that a push of it that was overtaken finds its number used.
        Raises what open_attempt raises.
        """
        attempt = await self.open_attempt(key, secret, claimed, number, writer_id)
        return isinstance(attempt, AlreadyCommitted) or await self.drop_attempt(attempt)

    async def drop_attempt(self, attempt: Attempt) -> bool:
        """Ends an attempt that is known and waits for its copies. Raises NotDrained when that takes too long."""
        with self._lock:
            committed = self._table.end_attempt(attempt)
        self._settle()
        await self._until(lambda: attempt.writes_under_way == 0, self._drain_timeout_s)
        return committed

    async def revoke(self, key: GrantKey) -> RangeSet:
        """Fences a grant at once and returns when nothing writes under it, with what was committed. Raises NotDrained
        when it takes too long; the grant stays fenced, also when cancelled."""
        with self._lock:
            self._table.revoke(key)
        self._settle()
        await self._until(lambda: self._table.is_drained(key), self._drain_timeout_s)
        with self._lock:
            return self._table.last_committed(key)

    async def idle(self) -> None:
        """Returns when no attempt is open. Its caller bounds the wait."""
        await self._until(lambda: self._table.is_idle, None)

    def fence_pool(self, pool_id: str) -> None:
        """Fences every grant of a pool at once."""
        with self._lock:
            for key in self._table.keys(pool_id):
                self._table.revoke(key)
        self._settle()

    async def forget_pool(self, pool_id: str) -> None:
        """Returns when nothing writes into the pool any more, and forgets all its grants. Raises NotDrained."""
        await self._until(lambda: not self._table.keys(pool_id), self._drain_timeout_s)
        with self._lock:
            self._table.forget_pool(pool_id)

    def take_progress(self) -> tuple[GrantStatus, ...]:
        """The condition of every grant under which bytes were written since the last call."""
        with self._lock:
            progressed, self._progressed = self._progressed, set()
            pool_ids = {key.pool_id for key in progressed}
            statuses = [status for pool_id in pool_ids for status in self._table.statuses(pool_id)]
        return tuple(status for status in statuses if status.key in progressed)

    def statuses(self, pool_id: str) -> tuple[GrantStatus, ...]:
        """The condition of every grant of a pool."""
        with self._lock:
            return self._table.statuses(pool_id)

    @contextmanager
    def fence_listener(self, attempt: Attempt, listener: Callable[[], None]) -> Iterator[None]:
        """Inside, `listener` is called on the loop when the attempt is fenced."""
        listeners = self._fence_listeners.setdefault(attempt, set())
        listeners.add(listener)
        try:
            yield
        finally:
            listeners.discard(listener)
            if not listeners:
                self._fence_listeners.pop(attempt, None)

    async def _until(self, condition: Callable[[], bool], timeout_s: float | None) -> None:
        """Waits until `condition`, called under the lock now and after every copy that drains and every attempt that
        ends, is true. Raises NotDrained."""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    with self._lock:
                        if condition():
                            break
                        future = self._loop.create_future()
                        self._waiting.add(future)
                    self._publish()
                    try:
                        await future
                    finally:
                        with self._lock:
                            self._waiting.discard(future)
        except TimeoutError:
            raise NotDrained("a copy that was fenced is still under way", retry_delay_s=_RETRY_DELAY_S) from None
        finally:
            self._publish()

    def _settle(self) -> None:
        """Wakes those who wait for copies to end, and tells of changes."""
        with self._lock:
            waiting = tuple(self._waiting)
        for future in waiting:
            if not future.done():
                future.set_result(None)
        self._publish()

    def _publish(self) -> None:
        """Tells of changes: the watchers of grants, and the pushes whose attempts were fenced."""
        with self._lock:
            changes = self._table.take_changes()
        if changes:
            self._on_changes(changes)
        for attempt, listeners in tuple(self._fence_listeners.items()):
            if attempt.fenced:
                for listener in tuple(listeners):
                    listener()
