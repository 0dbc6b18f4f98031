"""The receiving end of one push that is pulled: fetches piece after piece and copies each one under the grant."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeVar

from services.kvtransfer.errors import ChecksumMismatch, InvalidRequest
from services.kvtransfer.landing import Landing
from services.kvtransfer.plan import Piece
from services.kvtransfer.transports.pull.checksums import Checksum, layer_checksums
from services.kvtransfer.transports.pull.fetching import Fetched, Fetcher

T = TypeVar("T")

# Pieces of one push that are fetched or copied at once: enough that the network never waits for a copy.
WINDOW = 4


@dataclass(frozen=True, slots=True)
class PullState:
    """How far a pull is. `busy_s` is summed over pieces that ran at once."""

    layers_done: int
    num_bytes: int
    busy_s: float


class Puller:
    """Belongs to the running loop; copies run on `copiers`. `on_change` is called when `check` has news."""

    def __init__(
        self,
        landing: Landing,
        pieces: tuple[Piece, ...],
        fetcher: Fetcher,
        copiers: Executor,
        on_change: Callable[[], None],
        *,
        checksum: Checksum | None = None,
    ) -> None:
        """`checksum`: how pages are read for what arrived to be checked; None: it is not."""
        self._checksum = checksum
        self._wanted: tuple[int, ...] = ()
        self._landing = landing
        self._pieces = pieces
        self._fetcher = fetcher
        self._copiers = copiers
        self._on_change = on_change
        (self._shard,) = landing.shards
        self._pool = self._shard.pool
        self._layout = self._pool.shape.layout
        self._left_of_layer = [len(pieces)] * self._layout.layer_count
        self._layers_done = 0
        self._num_bytes = 0
        self._busy_s = 0.0
        self._posted = 0
        self._failure: Exception | None = None
        self._more = asyncio.Event()
        self._listening = ExitStack()
        self._listening.enter_context(landing.fence_listener(self._fenced))
        self._task = asyncio.create_task(self._run())

    def post(self, layer_end: int) -> None:
        """The layers before `layer_end` may be fetched."""
        self._posted = max(self._posted, min(layer_end, self._layout.layer_count))
        self._more.set()

    def expect(self, layer_checksums: tuple[int, ...]) -> None:
        """What must have arrived, a layer each."""
        self._wanted = layer_checksums

    def check(self) -> PullState:
        """How far it is. Raises ReservationGone or AttemptSuperseded if it was fenced, PeerLost, or what else went
        wrong."""
        state = PullState(self._layers_done, self._num_bytes, self._busy_s)
        failure = self._failure
        if failure is None and state.layers_done < self._layout.layer_count:
            failure = self._landing.refusal()
        if failure is not None:
            raise failure
        return state

    async def finish(self) -> bool:
        """After the last layer is in place: as Landing.mark_in_place. Raises InvalidRequest before, and
        ChecksumMismatch and DeviceFailed. One who is cancelled leaves when no page is read any more."""
        if self._layers_done < self._layout.layer_count:
            raise InvalidRequest("`finish` comes after the last layer")
        if self._checksum is not None:
            if len(self._wanted) != self._layout.layer_count:
                raise InvalidRequest("`finish` comes after a checksum of every layer")
            loop = asyncio.get_running_loop()
            await to_the_end(loop.run_in_executor(self._copiers, self._compare, self._checksum))
        committed = self._landing.mark_in_place()
        self._fetcher.keep()
        return committed

    async def close(self) -> None:
        """No further copy begins; returns when none is under way. Fetches that are still moving end in their buffers.
        Again is no error."""
        self._listening.close()
        self._task.cancel()
        await asyncio.wait([self._task])

    def _compare(self, checksum: Checksum) -> None:
        """What lies in the pages, with what the sender says of its own."""
        shard, part = self._shard, self._landing.part
        found = layer_checksums(checksum, shard.pool, shard.page_ids, part)
        for layer, there in enumerate(self._wanted):
            # As a write: nobody gets a page, nor unmaps the pool, while a layer of it is read.
            self._landing.begin_write(part)
            try:
                here = next(found)
            finally:
                self._landing.end_write(shard.pool, 0)
            if here != there:
                raise ChecksumMismatch(f"layer {layer}, tokens {part}")

    def _fenced(self) -> None:
        self._task.cancel()
        self._on_change()

    async def _run(self) -> None:
        window = asyncio.Semaphore(WINDOW)
        try:
            async with asyncio.TaskGroup() as group:
                for layer in range(self._layout.layer_count):
                    while layer >= self._posted:
                        self._more.clear()
                        await self._more.wait()
                    for piece in self._pieces:
                        await window.acquire()
                        task = group.create_task(self._move(layer, piece))
                        task.add_done_callback(lambda _: window.release())
        except* Exception as errors:
            self._failure = _first(errors)
            self._on_change()

    async def _move(self, layer: int, piece: Piece) -> None:
        begin_s = time.perf_counter()
        async with self._fetcher.fetch(layer, piece) as fetched:
            copy = asyncio.get_running_loop().run_in_executor(self._copiers, self._copy, layer, piece, fetched)
            await to_the_end(copy)
        self._busy_s += time.perf_counter() - begin_s
        self._num_bytes += piece.num_bytes
        self._left_of_layer[layer] -= 1
        while self._layers_done < len(self._left_of_layer) and not self._left_of_layer[self._layers_done]:
            self._layers_done += 1
        self._on_change()

    def _copy(self, layer: int, piece: Piece, fetched: Fetched) -> None:
        """On a thread of its own: the only place where bytes of a pull enter a page."""
        self._landing.begin_write(piece.part)
        num_bytes = 0
        try:
            fetched.place(self._pool, layer, piece.runs)
            num_bytes = piece.num_bytes
        finally:
            self._landing.end_write(self._pool, num_bytes)


async def to_the_end(copy: asyncio.Future[T]) -> T:
    """Awaits what a thread copies or reads, which cannot be stopped: a cancelled caller leaves when it has ended."""
    try:
        return await asyncio.shield(copy)
    except asyncio.CancelledError:
        await asyncio.wait([copy])
        if not copy.cancelled():
            copy.exception()
        raise


def _first(errors: ExceptionGroup[Exception]) -> Exception:
    """What went wrong first; the rest follows from it."""
    error = errors.exceptions[0]
    return _first(error) if isinstance(error, ExceptionGroup) else error
