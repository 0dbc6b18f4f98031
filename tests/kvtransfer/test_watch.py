"""A slow watcher gets the newest condition of each grant, and is told when it is too slow."""

from __future__ import annotations

import pytest

from services.kvtransfer import watch
from services.kvtransfer.errors import EngineGone, WatchLagged
from services.kvtransfer.watch import GrantFeed, GrantFeeds
from services.protocol.grants import GrantKey, GrantState, GrantStatus
from services.protocol.ranges import RangeSet


def status(reservation: str, num_bytes: int = 0, pool: str = "pool") -> GrantStatus:
    return GrantStatus(GrantKey(pool, reservation), GrantState.OPEN, RangeSet(), num_bytes)


async def test_newest_wins() -> None:
    feed = GrantFeed("pool", [status("a")])
    for num_bytes in range(5):
        feed.offer(status("a", num_bytes))
        feed.offer(status("b", num_bytes))
    feed.end()
    batches = [batch async for batch in feed.batches()]
    assert [batch.snapshot for batch in batches] == [True, False]
    assert batches[0].events == (status("a"),)
    assert batches[1].events == (status("a", 4), status("b", 4))


async def test_what_comes_while_a_batch_is_read_follows() -> None:
    feed = GrantFeed("pool", [])
    batches = feed.batches()
    await anext(batches)
    feed.offer(status("a", 1))
    assert (await anext(batches)).events == (status("a", 1),)
    feed.offer(status("a", 2))
    feed.end()
    assert (await anext(batches)).events == (status("a", 2),)
    with pytest.raises(StopAsyncIteration):
        await anext(batches)


async def test_a_failure_comes_after_what_is_pending() -> None:
    feeds = GrantFeeds()
    feed = feeds.open("pool", [])
    feeds.publish([status("a"), status("b", pool="other")])
    feeds.engine_gone("pool")
    batches = feed.batches()
    await anext(batches)
    assert (await anext(batches)).events == (status("a"),)
    with pytest.raises(EngineGone):
        await anext(batches)
    feeds.close(feed)


async def test_too_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "MAX_PENDING", 2)
    feed = GrantFeed("pool", [])
    for name in "abc":
        feed.offer(status(name))
    with pytest.raises(WatchLagged):
        [batch async for batch in feed.batches()]
