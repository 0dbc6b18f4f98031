"""Moves pages between two pools of this service: copies in shared memory, checked one by one."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple, Protocol

from services.kvtransfer.copier import Copier, Copy
from services.kvtransfer.errors import ChecksumMismatch, InvalidPages, TransportFailed
from services.kvtransfer.landing import Claim, Landing, Landings
from services.kvtransfer.leg_copy import LayerPair, LegCopy, PieceCopy, SourceTokens, copy_piece, same_piece
from services.kvtransfer.pool import Pool
from services.kvtransfer.streaming import page_copier
from services.kvtransfer.transports.base import Capabilities, Peer, PutProgress, PutRequest, Reach, Unsupported
from services.protocol.address import KvAddress
from services.protocol.grants import AlreadyCommitted
from services.protocol.ranges import TokenRange

_NEWS_INTERVAL_NS = 10_000_000


class ShmTransport:
    """One-sided copies by the threads of a Copier, at most `max_copy_bytes` under one check."""

    capabilities = Capabilities("shm", Reach.SAME_SERVICE)

    def __init__(
        self, landings: Landings, copier: Copier, epoch: bytes, max_copy_bytes: int, *, checked: bool = False
    ) -> None:
        """`checked`: every copy is read again and compared."""
        page_copier()  # now, so that no push waits until it is made
        self._checked = checked
        self._landings = landings
        self._copier = copier
        self._epoch = epoch
        self._max_copy_bytes = max_copy_bytes

    def offer(self) -> str | None:
        """See Transport.offer. Other services do not come in."""
        return None

    def refuses(self, source: Pool, address: KvAddress, peer: Peer) -> Unsupported | None:
        """Only pools of this service in host memory are within reach."""
        if source.device_address is not None:
            return Unsupported("the pool is in memory of a GPU")
        if peer.epoch != self._epoch:
            return Unsupported("the target belongs to another transfer service")
        return None

    async def probe(self, peer: Peer) -> float | None:
        """See Transport.probe. Nothing is faster than memory."""
        return None

    async def open(self, request: PutRequest, on_change: Callable[[], None]) -> ShmLane | AlreadyCommitted:
        """See Transport.open."""
        shards = self._landings.check(request.address, request.claim, request.part)
        for shard in shards:
            if request.source is shard.pool and not set(request.source_page_ids).isdisjoint(shard.page_ids):
                raise InvalidPages("a page is source and target at once")
            if (shard.pool.device_address is None) != (request.source.device_address is None):
                raise TransportFailed("one of the two pools is in memory of a GPU")
        extent = request.source.shape.part.extent
        landing = await self._landings.open(request.address, request.claim, request.part, extent)
        if isinstance(landing, AlreadyCommitted):
            return landing
        return self._lane(landing, SourceTokens(request.source, request.source_page_ids, request.part), on_change)

    def _lane(self, landing: Landing, tokens: SourceTokens, on_change: Callable[[], None]) -> ShmLane:
        ways = [LegCopy(tokens, landing.shards[leg.target_index], leg, self._max_copy_bytes) for leg in landing.legs]
        copy = _copy_and_compare if self._checked else copy_piece
        return ShmLane(self._copier, landing, ways, copy, on_change)

    async def end_attempt(self, peer: Peer, address: KvAddress, claim: Claim) -> bool:
        """See Transport.end_attempt."""
        return await self._landings.end(address, claim)

    async def close(self) -> None:
        """See Transport.close. The threads belong to the service."""


class Piece(Protocol):
    """What is copied of a layer under one check."""

    @property
    def part(self) -> TokenRange:
        """Its positions."""

    @property
    def num_bytes(self) -> int:
        """Its size."""


class Way(Protocol):
    """What goes from the sender's pool to one of the receiver's, for instance LegCopy."""

    pool: Pool
    layers: range

    @property
    def pieces(self) -> Sequence[Piece]:
        """Of each layer."""

    def layer(self, source_layer: int) -> Any:
        """What the copies of a layer have in common."""


class LayerCopy(NamedTuple):
    """One piece of one layer."""

    layer: int
    pool: Pool
    pair: Any
    piece: Piece


class ShmLane:
    """A put under way. Threads take its copies in order of layers; any number of them at once."""

    def __init__(
        self,
        copier: Copier,
        landing: Landing,
        ways: Sequence[Way],
        copy_piece: Callable[[Any, Any], None],
        on_change: Callable[[], None],
    ) -> None:
        """`copy_piece` takes what Way.layer made and one of Way.pieces; any thread."""
        self._copier = copier
        self._landing = landing
        self._copy_piece = copy_piece
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._listening = ExitStack()
        self._listening.enter_context(landing.fence_listener(self._notify))
        self._idle: asyncio.Future[None] | None = None
        # The rest is shared with the copying threads, under the lock.
        self._lock = threading.Lock()
        self._ways = ways
        self._posted = 0
        self._entered = 0
        self._next: deque[LayerCopy] = deque()  # of the layer that was entered last
        self._under_way = 0
        self._left_of_layer = [
            sum(len(way.pieces) for way in ways if layer in way.layers) for layer in range(landing.extent.layer_count)
        ]
        self._layers_done = 0
        self._num_bytes = 0
        self._busy_ns = 0
        self._failure: Exception | None = None
        self._closed = False
        self._notified = False
        self._next_news_ns = 0

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
            self._posted = max(self._posted, layer_end)
        self._copier.submit(self)

    def check(self) -> PutProgress:
        """See Lane.check."""
        with self._lock:
            self._notified = False
            failure = self._failure
            progress = PutProgress(self._layers_done, self._num_bytes)
        if failure is None and progress.layers_done < len(self._left_of_layer):
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
        self._ways = []
        self._next.clear()

    def take(self) -> Copy | None:
        """See CopySource.take."""
        with self._lock:
            if self._closed or self._failure is not None:
                return None
            while not self._next:
                if self._entered >= self._posted:
                    return None
                self._enter(self._entered)
                self._entered += 1
            self._under_way += 1
            return partial(self._copy, self._next.popleft())

    def _enter(self, layer: int) -> None:
        for way in self._ways:
            if layer in way.layers:
                pair = way.layer(layer)
                self._next.extend(LayerCopy(layer, way.pool, pair, piece) for piece in way.pieces)

    def _copy(self, copy: LayerCopy) -> None:
        failure: Exception | None = None
        begin = time.perf_counter_ns()
        try:
            self._landing.begin_write(copy.piece.part)
            num_bytes = 0
            try:
                self._copy_piece(copy.pair, copy.piece)
                num_bytes = copy.piece.num_bytes
            finally:
                self._landing.end_write(copy.pool, num_bytes)
        except Exception as error:  # the thread must go on; whoever checks the lane gets it
            failure = error
        self._copied(copy, failure, time.perf_counter_ns() - begin)

    def _copied(self, copy: LayerCopy, failure: Exception | None, busy_ns: int) -> None:
        with self._lock:
            self._under_way -= 1
            self._busy_ns += busy_ns
            news = False
            if failure is not None:
                self._failure = self._failure or failure
                news = True
            else:
                self._num_bytes += copy.piece.num_bytes
                self._left_of_layer[copy.layer] -= 1
                while self._layers_done < len(self._left_of_layer) and not self._left_of_layer[self._layers_done]:
                    self._layers_done += 1
                    # Waking the loop takes time from the copies; in the middle, now and then is enough.
                    news = self._layers_done == self._posted or time.perf_counter_ns() >= self._next_news_ns
            ended = self._closed and self._under_way == 0
            call = ended or (news and not self._notified)
            if news:
                self._notified = True
                self._next_news_ns = time.perf_counter_ns() + _NEWS_INTERVAL_NS
        if call:
            self._loop.call_soon_threadsafe(self._notify)

    def _notify(self) -> None:
        if self._idle is not None and self._under_way == 0 and not self._idle.done():
            self._idle.set_result(None)
        self._on_change()


def _copy_and_compare(pair: LayerPair, piece: PieceCopy) -> None:
    copy_piece(pair, piece)
    if not same_piece(pair, piece):
        raise ChecksumMismatch(f"tokens {piece.part} of a layer")
