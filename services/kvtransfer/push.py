"""One push: follows the ready counter layer by layer and reports how far it is."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from services.kvtransfer.control import ControlPage
from services.kvtransfer.errors import PushStalled, TransportFailed
from services.kvtransfer.transports.base import Lane, PutProgress, PutRequest, Transport
from services.protocol.errors import ServiceError
from services.protocol.grants import AlreadyCommitted

_REPORT_INTERVAL_S = 0.02


class PushState(Enum):
    """How far a push is; see kvtransfer.v1.PushState."""

    OPEN = "OPEN"
    MOVING = "MOVING"
    DONE = "DONE"
    COMMITTED = "COMMITTED"

    @property
    def last(self) -> bool:
        """Whether nothing comes after it."""
        return self in (PushState.DONE, PushState.COMMITTED)


@dataclass(frozen=True, slots=True)
class PushProgress:
    """One progress message. `exposed_s`: from the last layer ready to the last byte in place."""

    state: PushState
    layers_done: int
    num_bytes: int
    transport: str
    exposed_s: float = 0.0


class ReadySource(Protocol):
    """Tells how many layers are computed."""

    def ready_layers(self) -> int:
        """Layers that may be read by now."""

    def listening(self, listener: Callable[[], None]) -> AbstractContextManager[None]:
        """Inside, `listener` is called on the loop whenever that may have changed."""


@dataclass(frozen=True, slots=True)
class AllReady:
    """Every layer is computed before the push begins."""

    layer_count: int

    def ready_layers(self) -> int:
        """See ReadySource."""
        return self.layer_count

    def listening(self, listener: Callable[[], None]) -> AbstractContextManager[None]:
        """See ReadySource."""
        return nullcontext()


@dataclass(frozen=True, slots=True)
class SlotReady:
    """Follows a ready counter in a pool's control page."""

    control: ControlPage
    slot: int

    def ready_layers(self) -> int:
        """See ReadySource."""
        return self.control.ready_layers(self.slot)

    def listening(self, listener: Callable[[], None]) -> AbstractContextManager[None]:
        """See ReadySource."""
        return self.control.listening(listener)


class PushObserver(Protocol):
    """Keeps the books of pushes."""

    def failed_to_open(self, push: Push, error: TransportFailed) -> None:
        """`push.transport` cannot at present; the next best one is tried, if there is one."""

    def opened(self, push: Push) -> None:
        """The push's attempt is open at the receiver."""

    def moved(self, push: Push, num_bytes: int) -> None:
        """So many more bytes are in place."""

    def ended(self, push: Push, failure: BaseException | None) -> None:
        """The source is read no more."""


class Push:
    """Runs as a task of its own, so that neither a slow reader nor a cancelled one decides when copying has ended."""

    def __init__(
        self,
        request: PutRequest,
        route: Sequence[Transport],
        ready: ReadySource,
        stall_timeout_s: float,
        observer: PushObserver,
    ) -> None:
        """`route`: transports that can, best first; at least one."""
        self.request = request
        self.transport = route[0]
        self._route = route
        self.progress: PushProgress | None = None
        self.busy_s = 0.0
        self._counted_bytes = 0
        self._ready = ready
        self._stall_timeout_s = stall_timeout_s
        self._observer = observer
        self._wake = asyncio.Event()
        self._stop: ServiceError | None = None
        self._news = asyncio.Event()
        self.begin_s = asyncio.get_running_loop().time()
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(self._finished)

    def stop(self, why: ServiceError) -> None:
        """Ends the push at the next page; it raises `why`. Does nothing when it has ended."""
        self._stop = self._stop or why
        self._wake.set()

    async def ended(self) -> None:
        """Returns when the source is read no more and nothing is written. Cancelling only stops waiting."""
        await asyncio.wait([self._task])

    async def updates(self) -> AsyncGenerator[PushProgress, None]:
        """The newest progress, whenever there is news, the last state last. Raises what ended the push.

        Cancelling does not stop the push.
        """
        while True:
            await self._news.wait()
            # A message costs as much as a layer's copy: what comes within a moment makes one.
            await asyncio.wait([self._task], timeout=_REPORT_INTERVAL_S)
            self._news.clear()
            done, progress = self._task.done(), self.progress
            if done:
                self._task.result()
            if progress is not None and (done or not progress.state.last):
                yield progress
            if done:
                return

    async def _run(self) -> None:
        failure: BaseException | None = None
        try:
            with self._ready.listening(self._wake.set):
                await self._transfer()
        except BaseException as error:
            failure = error
            raise
        finally:
            self._observer.ended(self, failure)

    def _finished(self, task: asyncio.Task[None]) -> None:
        # Taken here, because nobody reads the outcome of a push whose caller has left.
        if not task.cancelled():
            task.exception()
        self._news.set()

    async def _transfer(self) -> None:
        lane = await self._open()
        if isinstance(lane, AlreadyCommitted):
            self._report(PushState.COMMITTED, PutProgress(self._layer_count))
            return
        try:
            self._observer.opened(self)
            last_ready_s = await self._move(lane)
            committed = await lane.finish()
            exposed_s = asyncio.get_running_loop().time() - last_ready_s
            state = PushState.COMMITTED if committed else PushState.DONE
            self._report(state, lane.check(), exposed_s)
        finally:
            await lane.close()
            self.busy_s = lane.busy_s
            # What was moved since the last report, if the push failed.
            self._count(lane.num_bytes)

    async def _open(self) -> Lane | AlreadyCommitted:
        for transport in self._route:
            self.transport = transport
            try:
                return await transport.open(self.request, self._wake.set)
            except TransportFailed as error:
                self._observer.failed_to_open(self, error)
                failure = error
        raise failure

    async def _move(self, lane: Lane) -> float:
        """Returns, when all layers are in place, the loop's time when the last one was ready."""
        now = asyncio.get_running_loop().time
        posted, last_ready_s, deadline_s = 0, now(), 0.0
        before: PutProgress | None = None
        while True:
            self._wake.clear()
            if self._stop is not None:
                raise self._stop
            progress = lane.check()
            ready = min(self._ready.ready_layers(), self._layer_count)
            if ready > posted:
                posted, last_ready_s = ready, now()
                lane.post(posted)
                deadline_s = last_ready_s + self._stall_timeout_s
            if progress != before:
                self._report(PushState.MOVING if progress.layers_done else PushState.OPEN, progress)
                before, deadline_s = progress, now() + self._stall_timeout_s
            if progress.layers_done == self._layer_count:
                return last_ready_s
            if now() >= deadline_s:
                raise PushStalled(f"no progress within {self._stall_timeout_s:g} s")
            # Lanes tell of layers, and not of every byte: at the deadline the bytes are looked at again.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(deadline_s):
                    await self._wake.wait()

    def _report(self, state: PushState, progress: PutProgress, exposed_s: float = 0.0) -> None:
        name = self.transport.capabilities.name
        self.progress = PushProgress(state, progress.layers_done, progress.num_bytes, name, exposed_s)
        self._count(progress.num_bytes)
        self._news.set()

    def _count(self, num_bytes: int) -> None:
        """Tells the observer of the bytes that it was not told of yet."""
        if num_bytes > self._counted_bytes:
            self._observer.moved(self, num_bytes - self._counted_bytes)
            self._counted_bytes = num_bytes

    @property
    def _layer_count(self) -> int:
        return self.request.source.shape.layout.layer_count
