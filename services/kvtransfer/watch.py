"""What watchers of a pool's grants still have to be told, at most one condition a grant."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass

from services.kvtransfer.errors import EngineGone, WatchLagged
from services.protocol.errors import ServiceError
from services.protocol.grants import GrantKey, GrantStatus

# Ended grants pile up for a watcher that reads nothing; open ones are bounded by the pool's pages.
MAX_PENDING = 65_536


@dataclass(frozen=True, slots=True)
class GrantBatch:
    """Conditions of grants. The first batch, the snapshot, names all of them."""

    events: tuple[GrantStatus, ...]
    snapshot: bool


class GrantFeed:
    """One watcher's pending conditions. A newer one replaces an older one that was not read yet."""

    def __init__(self, pool_id: str, snapshot: Iterable[GrantStatus]) -> None:
        self.pool_id = pool_id
        self._snapshot = tuple(snapshot)
        self._pending: dict[GrantKey, GrantStatus] = {}
        self._wake = asyncio.Event()
        self._failure: ServiceError | None = None
        self._ended = False

    def offer(self, status: GrantStatus) -> None:
        """Replaces what is pending for the grant."""
        self._pending[status.key] = status
        if len(self._pending) > MAX_PENDING:
            self.fail(WatchLagged("too many grants changed since the last read"))
        self._wake.set()

    def fail(self, failure: ServiceError) -> None:
        """Ends the feed with an error after what is pending."""
        self._failure = self._failure or failure
        self._wake.set()

    def end(self) -> None:
        """Ends the feed well after what is pending."""
        self._ended = True
        self._wake.set()

    async def batches(self) -> AsyncGenerator[GrantBatch, None]:
        """Snapshot, then changes. Cancelling loses what was not read, so a new feed must follow."""
        yield GrantBatch(self._snapshot, snapshot=True)
        while True:
            await self._wake.wait()
            self._wake.clear()
            if self._pending:
                events, self._pending = tuple(self._pending.values()), {}
                yield GrantBatch(events, snapshot=False)
            if self._pending:
                self._wake.set()
            elif self._failure is not None:
                raise self._failure
            elif self._ended:
                return


class GrantFeeds:
    """All feeds."""

    def __init__(self) -> None:
        self._feeds: set[GrantFeed] = set()

    def open(self, pool_id: str, snapshot: Iterable[GrantStatus]) -> GrantFeed:
        """A feed that begins with the present condition of the pool's grants. The caller closes it."""
        feed = GrantFeed(pool_id, snapshot)
        self._feeds.add(feed)
        return feed

    def close(self, feed: GrantFeed) -> None:
        """Forgets a feed."""
        self._feeds.discard(feed)

    def publish(self, statuses: Iterable[GrantStatus]) -> None:
        """Offers new conditions to those who watch them."""
        for status in statuses:
            for feed in self._feeds:
                if feed.pool_id == status.key.pool_id:
                    feed.offer(status)

    def engine_gone(self, pool_id: str) -> None:
        """Ends the feeds of a pool whose engine is gone."""
        for feed in self._feeds:
            if feed.pool_id == pool_id:
                feed.fail(EngineGone("the pool's engine is gone"))

    def end(self) -> None:
        """Ends all feeds well."""
        for feed in self._feeds:
            feed.end()
