"""Loads and cache events: at one's own pace, bounded, and ended when the engine ends."""

from __future__ import annotations

import asyncio

import pytest

from services.engine.core.api import CacheEvent, Command, UnwatchCache, WatchCache
from services.engine.errors import EngineDraining
from services.engine.front.cache_watch import CacheWatches
from services.engine.front.errors import CacheWatchBehind
from services.engine.front.loads import LoadBoard
from services.engine.front.outbox import Outbox
from services.engine.front.replies import MAX_BLOCKS_PER_MESSAGE, to_cache_events
from tests.engine.front.harness import load

ENDED = EngineDraining("The engine is shutting down.")


async def test_a_watch_begins_with_the_load_as_it_is_and_skips_what_it_missed() -> None:
    board = LoadBoard(Outbox())
    board.publish(load(1))
    watch = board.watch(0.01)
    assert (await anext(watch)).steps == 1
    for steps in range(2, 50):
        board.publish(load(steps))
    assert (await anext(watch)).steps == 49
    await watch.aclose()


async def test_reports_keep_their_distance() -> None:
    board, now = LoadBoard(Outbox()), asyncio.get_running_loop().time
    board.publish(load(1))
    watch = board.watch(0.05)
    await anext(watch)
    begin = now()
    board.publish(load(2))
    await anext(watch)
    assert now() - begin >= 0.05
    await watch.aclose()


async def test_an_equal_load_is_no_news() -> None:
    board = LoadBoard(Outbox())
    board.publish(load(1))
    watch = board.watch(0.0)
    await anext(watch)
    waiting = asyncio.ensure_future(anext(watch))
    board.publish(load(1))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not waiting.done()
    board.publish(load(2))
    assert (await waiting).steps == 2
    await watch.aclose()


async def test_the_event_loop_is_woken_only_for_a_watcher_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    board, posted = LoadBoard(outbox := Outbox()), []
    monkeypatch.setattr(outbox, "post", lambda call: (posted.append(call), call()))
    board.publish(load(1))
    assert not posted
    watch = board.watch(0.0)
    await anext(watch)
    waiting = asyncio.ensure_future(anext(watch))
    await asyncio.sleep(0.001)
    before = len(posted)
    board.publish(load(2))
    board.publish(load(3))
    assert len(posted) == before + 1
    assert (await waiting).steps == 3
    await watch.aclose()


@pytest.mark.parametrize("interval_s", [0.0, 3600.0])
async def test_the_end_is_heard_at_once(interval_s: float) -> None:
    board = LoadBoard(Outbox())
    board.publish(load(1))
    watch = board.watch(interval_s)
    await anext(watch)
    waiting = asyncio.ensure_future(anext(watch))
    await asyncio.sleep(0)
    board.end(ENDED)
    with pytest.raises(EngineDraining):
        await waiting
    with pytest.raises(EngineDraining):
        await anext(board.watch(0.0))


class Watched:
    """Cache watches with the loop thread's side at hand."""

    def __init__(self, max_unread: int) -> None:
        self.commands: list[Command] = []
        self.watches = CacheWatches(self.commands.append, Outbox(), max_unread)

    def tell(self, sequence: int, *, snapshot: bool = False) -> None:
        command = self.commands[0]
        assert isinstance(command, WatchCache)
        command.on_event(CacheEvent(sequence, snapshot, (b"s",), ()))


async def test_events_come_in_order_and_the_end_is_told() -> None:
    watched = Watched(max_unread=8)
    watch = watched.watches.watch()
    first = asyncio.ensure_future(anext(watch))
    await asyncio.sleep(0)
    await asyncio.to_thread(watched.tell, 7, snapshot=True)
    assert (await first).snapshot
    watched.tell(8)
    watched.tell(9)
    assert [(await anext(watch)).sequence for _ in range(2)] == [8, 9]
    await watch.aclose()
    assert isinstance(watched.commands[-1], UnwatchCache)


async def test_who_falls_behind_must_begin_again() -> None:
    watched = Watched(max_unread=2)
    watch = watched.watches.watch()
    first = asyncio.ensure_future(anext(watch))
    await asyncio.sleep(0)
    watched.tell(1, snapshot=True)
    await first
    for sequence in range(2, 6):
        watched.tell(sequence)
    await asyncio.sleep(0)
    with pytest.raises(CacheWatchBehind):
        await anext(watch)
    assert isinstance(watched.commands[-1], UnwatchCache)


async def test_cache_watches_end_with_the_engine() -> None:
    watched = Watched(max_unread=2)
    waiting = asyncio.ensure_future(anext(watched.watches.watch()))
    await asyncio.sleep(0)
    watched.watches.end(ENDED)
    with pytest.raises(EngineDraining):
        await waiting


@pytest.mark.parametrize("num_blocks", [0, 1, MAX_BLOCKS_PER_MESSAGE, MAX_BLOCKS_PER_MESSAGE + 1])
def test_a_snapshot_of_any_size_is_one_or_more_messages_of_one_number(num_blocks: int) -> None:
    blocks = tuple(index.to_bytes(16, "little") for index in range(num_blocks))
    messages = list(to_cache_events(CacheEvent(5, True, blocks, ())))
    assert [message.snapshot_complete for message in messages] == [False] * (len(messages) - 1) + [True]
    assert {(message.sequence, message.snapshot) for message in messages} == {(5, True)}
    assert tuple(block.value for message in messages for block in message.stored) == blocks
    assert all(message.ByteSize() < 1 << 20 for message in messages)
