"""The receiving service's side of Pull: one stream, from its opening to its end."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from enum import Enum

from services.kvtransfer.errors import InvalidRequest, NoTransport, PushStalled
from services.kvtransfer.landing import Claim, Landing, Landings
from services.kvtransfer.plan import PageTable, plan_pieces
from services.kvtransfer.transports.pull.fetching import Fetch, SinkSide, SourcePool
from services.kvtransfer.transports.pull.puller import Puller, PullState
from services.protocol.address import KvAddress
from services.protocol.errors import LayoutMismatch
from services.protocol.grants import AlreadyCommitted
from services.protocol.ranges import TokenRange


@dataclass(frozen=True, slots=True)
class PullOpen:
    """What the sender offers; see kvtransfer.v1.PullOpen."""

    address: KvAddress
    claim: Claim
    part: TokenRange
    source: SourcePool
    source_page_ids: tuple[int, ...]
    transport: str
    checksums: bool = False


@dataclass(frozen=True, slots=True)
class Ready:
    """The layers before it may be fetched."""

    layer_end: int


@dataclass(frozen=True, slots=True)
class Checksums:
    """What must have arrived; see kvtransfer.v1.PullChecksums."""

    layers: tuple[int, ...]


class Last(Enum):
    """What a sender says last."""

    FINISH = "FINISH"
    LEAVE = "LEAVE"


@dataclass(frozen=True, slots=True)
class Opened:
    """The first answer. `checksums`: the sender must tell them before it says FINISH."""

    committed: bool
    checksums: bool = False


@dataclass(frozen=True, slots=True)
class Finished:
    """The last answer."""

    committed: bool


Said = Ready | Checksums | Last
Answer = Opened | Fetch | PullState | Finished


class PullSessions:
    """Serves every Pull of this service. `sinks` are the transports it offers, by name."""

    def __init__(
        self,
        landings: Landings,
        sinks: Mapping[str, SinkSide],
        copiers: Executor,
        max_copy_bytes: int,
        patience_s: float,
        *,
        checksums: bool = False,
    ) -> None:
        self._landings = landings
        self._sinks = sinks
        self._copiers = copiers
        self._max_copy_bytes = max_copy_bytes
        self._patience_s = patience_s
        self._checksums = checksums

    async def serve(self, opening: PullOpen, said: AsyncIterator[Said]) -> AsyncGenerator[Answer, None]:
        """Answers of one stream. A stream that breaks, or is closed before its last word, ends the attempt.

        Raises what Landings.open raises, LayoutMismatch, InvalidRequest, InvalidPages, NoTransport, PeerLost,
        PushStalled, ChecksumMismatch, DeviceFailed.
        """
        sink = self._sinks.get(opening.transport)
        if sink is None:
            raise NoTransport(f"this service does not offer {opening.transport!r}")
        self._check(opening, sink)
        news, asked = asyncio.Event(), deque[Fetch]()

        def ask(fetch: Fetch) -> None:
            asked.append(fetch)
            news.set()

        # Before the attempt: if this transport cannot, another one may still open it.
        async with sink.connect(opening.source, ask) as fetcher:
            landing = await self._landings.open(opening.address, opening.claim, opening.part, opening.address.whole)
            if isinstance(landing, AlreadyCommitted):
                yield Opened(committed=True)
                return
            max_bytes = min(self._max_copy_bytes, sink.buffer_bytes)
            layout, (shard,) = opening.source.layout, landing.shards
            source, target = (PageTable(ids, layout.page_size) for ids in (opening.source_page_ids, shard.page_ids))
            token_bytes = layout.layer_page_bytes // layout.page_size
            pieces = plan_pieces(opening.part, source, target, token_bytes, max_bytes)
            checksums = opening.checksums or self._checksums
            checksum = sink.checksum if checksums else None
            puller = Puller(landing, pieces, fetcher, self._copiers, news.set, checksum=checksum)
            opened = Opened(committed=False, checksums=checksums)
            async with contextlib.aclosing(self._follow(landing, puller, opened, said, news, asked)) as answers:
                async for answer in answers:
                    yield answer

    async def _follow(
        self,
        landing: Landing,
        puller: Puller,
        opened: Opened,
        said: AsyncIterator[Said],
        news: asyncio.Event,
        asked: deque[Fetch],
    ) -> AsyncGenerator[Answer, None]:
        listener = asyncio.create_task(_listen(said, puller, news.set))
        keeps = False
        try:
            yield opened
            async with contextlib.aclosing(self._progress(puller, listener, news, asked)) as answers:
                async for answer in answers:
                    yield answer
            finished = listener.result() is Last.FINISH
            committed = finished and await puller.finish()
            keeps = True
            if finished:
                yield Finished(committed)
        finally:
            listener.cancel()
            await puller.close()
            await asyncio.wait([listener])
            if not keeps:
                await landing.gate.drop_attempt(landing.attempt)

    async def _progress(
        self, puller: Puller, listener: asyncio.Task[Last], news: asyncio.Event, asked: deque[Fetch]
    ) -> AsyncGenerator[Fetch | PullState, None]:
        """What is asked for and the newest state, whenever there is news, until the sender has said its last word."""
        last: PullState | None = None
        while True:
            while asked:
                yield asked.popleft()
            state = puller.check()
            if state != last:
                yield state
                last = state
            if listener.done():
                return
            try:
                async with asyncio.timeout(self._patience_s):
                    await news.wait()
            except TimeoutError:
                raise PushStalled(f"neither a layer nor a byte came within {self._patience_s:g} s") from None
            news.clear()

    async def end(self, address: KvAddress, claim: Claim) -> bool:
        """Gives an attempt up; as Landings.end."""
        return await self._landings.end(address, claim)

    def _check(self, opening: PullOpen, sink: SinkSide) -> None:
        """The sender's half of an opening; Landings.open checks the other."""
        source = opening.source
        shards = self._landings.check(opening.address, opening.claim, opening.part)
        if len(shards) != 1 or source.layout != opening.address.layout:
            raise LayoutMismatch("this transport moves whole models between equal arrangements only")
        refusal = sink.refuses(shards[0].pool)
        if refusal is not None:
            raise NoTransport(refusal.why)
        if not opening.part:
            raise InvalidRequest("a push of nothing")
        shards[0].pool.shape.with_pages(source.page_count).check_pages(opening.source_page_ids, opening.part)


async def _listen(said: AsyncIterator[Said], puller: Puller, wake: Callable[[], None]) -> Last:
    """Follows the sender until its last word. Raises InvalidRequest if the stream ends without one."""
    try:
        async for word in said:
            if isinstance(word, Last):
                return word
            if isinstance(word, Checksums):
                puller.expect(word.layers)
            else:
                puller.post(word.layer_end)
            wake()
        raise InvalidRequest("the stream ended before its last word")
    finally:
        wake()
