"""Moves pages between two pools of this service: copies in shared memory, checked one by one."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import numpy as np
from numpy.typing import NDArray

from services.kvtransfer.copier import Copier, Copy
from services.kvtransfer.errors import InvalidPages
from services.kvtransfer.landing import Claim, Landing, Landings
from services.kvtransfer.plan import Piece, Run, plan_pieces
from services.kvtransfer.pool import Pool
from services.kvtransfer.transports.base import Capabilities, Peer, PutProgress, PutRequest, Reach, Unsupported
from services.protocol.address import KvAddress
from services.protocol.errors import LayoutMismatch
from services.protocol.grants import AlreadyCommitted
from services.protocol.layout import PageLayout


class ShmTransport:
    """One-sided copies by the threads of a Copier, at most `max_copy_bytes` under one check."""

    capabilities = Capabilities("shm", Reach.SAME_SERVICE)

    def __init__(self, landings: Landings, copier: Copier, epoch: bytes, max_copy_bytes: int) -> None:
        self._landings = landings
        self._copier = copier
        self._epoch = epoch
        self._max_copy_bytes = max_copy_bytes

    def offer(self) -> str | None:
        """See Transport.offer. Other services do not come in."""
        return None

    def refuses(self, source: Pool, address: KvAddress, peer: Peer) -> Unsupported | None:
        """Only pools of this service are within reach."""
        if peer.epoch != self._epoch:
            return Unsupported("the target belongs to another transfer service")
        return None

    async def probe(self, peer: Peer) -> float | None:
        """See Transport.probe. Nothing is faster than memory."""
        return None

    async def open(self, request: PutRequest, on_change: Callable[[], None]) -> ShmLane | AlreadyCommitted:
        """See Transport.open. Raises LayoutMismatch unless both pools have the same layout."""
        target, page_ids = self._landings.check(request.address, request.claim, request.part)
        if request.source.shape.layout != target.shape.layout:
            raise LayoutMismatch("sender and receiver arrange their pages differently")
        if request.source is target and not set(request.source_page_ids).isdisjoint(page_ids):
            raise InvalidPages("a page is source and target at once")
        landing = await self._landings.open(request.address, request.claim, request.part)
        if isinstance(landing, AlreadyCommitted):
            return landing
        pieces = plan_pieces(
            request.part,
            request.source_page_ids,
            landing.page_ids,
            target.shape.layout,
            self._max_copy_bytes,
        )
        return ShmLane(self._copier, request.source.pages, landing, pieces, on_change)

    async def end_attempt(self, peer: Peer, address: KvAddress, claim: Claim) -> bool:
        """See Transport.end_attempt."""
        return await self._landings.end(address, claim)

    async def close(self) -> None:
        """See Transport.close. The threads belong to the service."""


class LayerPages:
    """Two views of one layer of a pool."""

    __slots__ = ("tokens", "whole")

    def __init__(self, pages: NDArray[np.uint8], layout: PageLayout) -> None:
        self.whole = pages  # (page_count, layer_page_bytes)
        # (page_count, k|v and head, token, byte)
        self.tokens = pages.reshape(-1, 2 * layout.kv_head_count, layout.page_size, layout.token_bytes)


class ShmLane:
    """A put under way. Threads take its copies in order of layers; any number of them at once."""

    def __init__(
        self,
        copier: Copier,
        source: NDArray[np.uint8],  # (layer_count, page_count, layer_page_bytes)
        landing: Landing,
        pieces: tuple[Piece, ...],
        on_change: Callable[[], None],
    ) -> None:
        self._copier = copier
        layout = landing.pool.shape.layout
        self._source = [LayerPages(layer, layout) for layer in source]
        self._target = [LayerPages(layer, layout) for layer in landing.pool.pages]
        self._layer_count = layout.layer_count
        self._landing = landing
        self._pieces = pieces
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._listening = ExitStack()
        self._listening.enter_context(landing.fence_listener(self._notify))
        self._idle: asyncio.Future[None] | None = None
        # The rest is shared with the copying threads, under the lock.
        self._lock = threading.Lock()
        self._taken = 0
        self._posted = 0
        self._under_way = 0
        self._left_of_layer = [len(pieces)] * self._layer_count
        self._layers_done = 0
        self._num_bytes = 0
        self._busy_ns = 0
        self._failure: Exception | None = None
        self._closed = False
        self._notified = False

    @property
    def num_bytes(self) -> int:
        """See Lane.num_bytes."""
        return self._num_bytes

    @property
    def busy_s(self) -> float:
        """See Lane.busy_s."""
        return self._busy_ns / 1e9

    def post(self, layer_end: int) -> None:
        """See Lane.post."""
        with self._lock:
            self._posted = max(self._posted, layer_end * len(self._pieces))
        self._copier.submit(self)

    def check(self) -> PutProgress:
        """See Lane.check."""
        with self._lock:
            self._notified = False
            failure = self._failure
            progress = PutProgress(self._layers_done, self._num_bytes)
        if failure is None and progress.layers_done < self._layer_count:
            failure = self._landing.refusal()
        if failure is not None:
            raise failure
        return progress

    async def finish(self) -> bool:
        """See Lane.finish."""
        return self._landing.mark_in_place()

    async def close(self) -> None:
        """See Lane.close."""
        self._listening.close()
        with self._lock:
            self._closed = True
            if self._under_way and self._idle is None:
                self._idle = self._loop.create_future()
        if self._idle is not None:
            await asyncio.shield(self._idle)
        # A view that outlives the put would keep a freed pool mapped.
        self._source, self._target = [], []

    def take(self) -> Copy | None:
        """See CopySource.take."""
        with self._lock:
            if self._closed or self._failure is not None or self._taken >= self._posted:
                return None
            layer, index = divmod(self._taken, len(self._pieces))
            self._taken += 1
            self._under_way += 1
        return partial(self._copy, layer, self._pieces[index])

    def _copy(self, layer: int, piece: Piece) -> None:
        failure: Exception | None = None
        begin = time.perf_counter_ns()
        try:
            self._landing.begin_write(piece.part)
            num_bytes = 0
            try:
                copy_runs(self._source[layer], self._target[layer], piece.runs)
                num_bytes = piece.num_bytes
            finally:
                self._landing.end_write(num_bytes)
        except Exception as error:  # the thread must go on; whoever checks the lane gets it
            failure = error
        self._copied(layer, piece, failure, time.perf_counter_ns() - begin)

    def _copied(self, layer: int, piece: Piece, failure: Exception | None, busy_ns: int) -> None:
        with self._lock:
            self._under_way -= 1
            self._busy_ns += busy_ns
            news = False
            if failure is not None:
                self._failure = self._failure or failure
                news = True
            else:
                self._num_bytes += piece.num_bytes
                self._left_of_layer[layer] -= 1
                while self._layers_done < len(self._left_of_layer) and not self._left_of_layer[self._layers_done]:
                    self._layers_done += 1
                    news = True
            ended = self._closed and self._under_way == 0
            call = ended or (news and not self._notified)
            self._notified = self._notified or news
        if call:
            self._loop.call_soon_threadsafe(self._notify)

    def _notify(self) -> None:
        if self._idle is not None and self._under_way == 0 and not self._idle.done():
            self._idle.set_result(None)
        self._on_change()


def copy_runs(source: LayerPages, target: LayerPages, runs: tuple[Run, ...]) -> None:
    """Copies pages of a layer. numpy releases the GIL in each, and knows that the two do not overlap."""
    for run in runs:
        if run.tokens is None:
            target.whole[run.target_pages] = source.whole[run.source_pages]
        else:
            target.tokens[run.target_pages, :, run.tokens] = source.tokens[run.source_pages, :, run.tokens]
