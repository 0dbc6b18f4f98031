"""The sending service's side of Pull: what is computed is offered, and the receiver's progress followed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Protocol

from services.kvtransfer.errors import PeerLost, TransportFailed
from services.kvtransfer.landing import Claim
from services.kvtransfer.plan import PageTable, plan_pieces
from services.kvtransfer.pool import Pool
from services.kvtransfer.transports.base import Capabilities, Peer, PutProgress, PutRequest, Reach, Unsupported
from services.kvtransfer.transports.pull.checksums import Checksum, layer_checksums
from services.kvtransfer.transports.pull.fetching import Fetch, Served, SourcePool, SourceSide, byte_ranges_of
from services.kvtransfer.transports.pull.puller import PullState, to_the_end
from services.kvtransfer.transports.pull.session import (
    Answer,
    Checksums,
    Finished,
    Last,
    Opened,
    PullOpen,
    Ready,
    Said,
)
from services.protocol.address import KvAddress
from services.protocol.errors import ServiceError
from services.protocol.grants import AlreadyCommitted

# How long a receiver may take to confirm that it stopped. What it fetches after that it can no longer commit, because
# `finish` was not said, so the source pages may go to somebody else.
_LEAVE_TIMEOUT_S = 5.0
_FINISH_TIMEOUT_S = 30.0
# Answers to an opening that say nothing about the push: another transport may be tried. UNAVAILABLE is grpc's own.
_TRY_ANOTHER = frozenset({"NO_TRANSPORT", "TRANSPORT_FAILED", "UNAVAILABLE", "UNIMPLEMENTED"})


class PullCaller(Protocol):
    """Calls of KvPeerService. They raise ServiceError."""

    def pull(self, endpoint: str, opening: PullOpen, said: AsyncIterator[Said]) -> AsyncGenerator[Answer, None]:
        """One stream; closing it breaks it."""

    async def end(self, endpoint: str, address: KvAddress, claim: Claim) -> bool:
        """EndPull."""

    async def probe(self, endpoint: str, transport: str, offer: bytes) -> float:
        """ProbePull: bytes a second."""


class PullTransport:
    """A Transport whose receiving service fetches the bytes."""

    def __init__(
        self,
        side: SourceSide,
        caller: PullCaller,
        epoch: bytes,
        offer: str,
        probe_memory: Pool | None = None,
        *,
        checksums: bool = False,
    ) -> None:
        """`offer`: what GetInfo tells of it. `probe_memory` is fetched from in probes; None: it cannot be probed.
        `checksums`: whether the bytes are to be checked end to end."""
        self.capabilities = Capabilities(side.name, Reach.NETWORK)
        self._side = side
        self._caller = caller
        self._epoch = epoch
        self._offer = offer
        self._probe_memory = probe_memory
        self._checksums = checksums

    def offer(self) -> str | None:
        """See Transport.offer."""
        return self._offer

    def refuses(self, source: Pool, address: KvAddress, peer: Peer) -> Unsupported | None:
        """Services that offer the same transport are within reach."""
        if peer.epoch == self._epoch:
            return Unsupported("the target is in this service")
        if peer.offers.get(self.capabilities.name) != self._offer:
            return Unsupported("the receiving service does not offer it")
        if address.layout != source.shape.layout or len(address.shards) > 1:
            return Unsupported("sender and receiver arrange their pages differently")
        return self._side.refuses(source)

    async def probe(self, peer: Peer) -> float | None:
        """See Transport.probe. Between GPUs there is nothing to choose from, so what serves them has no probe."""
        if self._probe_memory is None or peer.offers.get(self.capabilities.name) != self._offer:
            return None
        async with self._side.serve(self._probe_memory, peer.endpoint) as served:
            try:
                return await self._caller.probe(peer.endpoint, self.capabilities.name, served.offer)
            except ServiceError as error:
                raise TransportFailed(error.message) from None

    async def open(self, request: PutRequest, on_change: Callable[[], None]) -> PullLane | AlreadyCommitted:
        """See Transport.open."""
        async with AsyncExitStack() as stack:
            served = await stack.enter_async_context(self._side.serve(request.source, request.peer.endpoint))
            source = SourcePool(request.source.shape.layout, request.source.shape.page_count, served.offer)
            opening = PullOpen(
                request.address,
                request.claim,
                request.part,
                source,
                request.source_page_ids,
                self.capabilities.name,
                self._checksums,
            )
            lane = PullLane(self._caller, request, opening, served, self._side.checksum, on_change)
            stack.push_async_callback(lane.close)
            try:
                committed = await lane.opened()
            except ServiceError as error:
                if error.reason in _TRY_ANOTHER:
                    raise TransportFailed(error.message) from None
                raise
            if committed:
                return AlreadyCommitted.VALUE
            lane.keep(stack.pop_all())
            return lane

    async def end_attempt(self, peer: Peer, address: KvAddress, claim: Claim) -> bool:
        """See Transport.end_attempt."""
        return await self._caller.end(peer.endpoint, address, claim)

    async def close(self) -> None:
        """See Transport.close. Both ends belong to the service."""


class PullLane:
    """A put under way."""

    def __init__(
        self,
        caller: PullCaller,
        request: PutRequest,
        opening: PullOpen,
        served: Served,
        checksum: Checksum,
        on_change: Callable[[], None],
    ) -> None:
        self._served = served
        self._posted = 0
        self._sending: set[asyncio.Task[None]] = set()
        self._source = request.source
        self._opening = opening
        self._checksum = checksum
        self._owes_checksums = False
        self._on_change = on_change
        self._to_say: asyncio.Queue[Said] = asyncio.Queue()
        self._opened: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._finished: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._state = PullState(0, 0, 0.0)
        self._failure: ServiceError | None = None
        self._held = AsyncExitStack()
        self._task = asyncio.create_task(self._follow(caller, request.peer.endpoint))

    @property
    def num_bytes(self) -> int:
        """See Lane.num_bytes."""
        return self._state.num_bytes

    @property
    def busy_s(self) -> float:
        """See Lane.busy_s."""
        return self._state.busy_s

    async def opened(self) -> bool:
        """Returns, when the receiver has answered, whether there is nothing to do. Raises its refusal."""
        return await asyncio.shield(self._opened)

    def keep(self, stack: AsyncExitStack) -> None:
        """What is to end with the lane."""
        self._held = stack

    def post(self, layer_end: int) -> None:
        """See Lane.post."""
        self._posted = max(self._posted, layer_end)
        self._to_say.put_nowait(Ready(layer_end))

    def check(self) -> PutProgress:
        """See Lane.check."""
        if self._failure is not None:
            raise self._failure
        return PutProgress(self._state.layers_done, self._state.num_bytes)

    async def finish(self) -> bool:
        """See Lane.finish. Raises PeerLost when the receiver does not answer: it may have committed then; DeviceFailed.
        One who is cancelled leaves when the source is read no more."""
        if self._owes_checksums:
            sums = layer_checksums(self._checksum, self._source, self._opening.source_page_ids, self._opening.part)
            reading = asyncio.ensure_future(asyncio.to_thread(tuple, sums))
            self._to_say.put_nowait(Checksums(await to_the_end(reading)))
        self._to_say.put_nowait(Last.FINISH)
        try:
            async with asyncio.timeout(_FINISH_TIMEOUT_S):
                committed = await asyncio.shield(self._finished)
                self._served.keep()
                return committed
        except TimeoutError:
            raise PeerLost("the receiving service did not confirm the last byte") from None

    async def close(self) -> None:
        """See Lane.close."""
        if not self._task.done():
            self._to_say.put_nowait(Last.LEAVE)
            await asyncio.wait([self._task], timeout=_LEAVE_TIMEOUT_S)
            self._task.cancel()
            await asyncio.wait([self._task])
        while self._sending:
            for task in self._sending:
                task.cancel()
            await asyncio.wait(self._sending)
        held, self._held = self._held, AsyncExitStack()
        await held.aclose()

    async def _follow(self, caller: PullCaller, endpoint: str) -> None:
        try:
            answers = caller.pull(endpoint, self._opening, self._say())
            async with contextlib.aclosing(answers):
                async for answer in answers:
                    self._heard(answer)
            self._over(PeerLost("the receiving service ended the stream"))
        except ServiceError as error:
            self._over(error)
        finally:
            self._over(PeerLost("the push was closed"))

    async def _say(self) -> AsyncGenerator[Said, None]:
        while True:
            word = await self._to_say.get()
            yield word
            if isinstance(word, Last):
                return

    def _heard(self, answer: Answer) -> None:
        match answer:
            case Opened():
                self._owes_checksums = answer.checksums
                self._opened.set_result(answer.committed)
            case PullState():
                self._state = answer
            case Fetch():
                task = asyncio.create_task(self._send(answer))
                self._sending.add(task)
                task.add_done_callback(self._sending.discard)
            case Finished() if not self._finished.done():
                self._finished.set_result(answer.committed)
        self._on_change()

    async def _send(self, fetch: Fetch) -> None:
        """What the receiver asked for, if it is what this push offers and computed."""
        part, layout = self._opening.part, self._opening.source.layout
        try:
            if not (0 <= fetch.layer < self._posted and fetch.part and part.contains(fetch.part)):
                raise PeerLost("the receiving service asked for what was not offered")
            indices, first = fetch.part.page_indices(layout.page_size), part.begin // layout.page_size
            page_ids = self._opening.source_page_ids[indices.start - first : indices.stop - first]
            table, whole_bytes = PageTable(page_ids, layout.page_size), layout.layer_page_bytes * len(page_ids)
            (piece,) = plan_pieces(fetch.part, table, table, layout.layer_page_bytes // layout.page_size, whole_bytes)
            await self._served.send(byte_ranges_of(fetch.layer, piece.runs, layout, self._opening.source.page_count))
        except ServiceError as error:
            self._over(error)

    def _over(self, why: ServiceError) -> None:
        """The stream has ended; whoever waits for an answer learns why."""
        if self._failure is None and not (self._finished.done() or (self._opened.done() and self._opened.result())):
            self._failure = why
        for future in (self._opened, self._finished):
            if not future.done() and self._failure is not None:
                future.set_exception(self._failure)
                future.exception()  # nobody may be waiting
        self._on_change()
