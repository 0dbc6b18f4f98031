"""The buffer between producer and consumer."""

from __future__ import annotations

import asyncio

import pytest

from services.router.errors import EngineLost, SlowConsumer
from services.router.fleet.mailbox import MAX_MERGED_WEIGHT, Mailbox
from services.router.values import Chunk, FinishReason


async def test_what_piles_up_comes_out_as_one() -> None:
    mailbox = Mailbox(100)
    for token in range(3):
        mailbox.put(Chunk((token,)))
    mailbox.put(Chunk((), finish=FinishReason.STOP))
    mailbox.close()
    assert await mailbox.take() == Chunk((0, 1, 2), finish=FinishReason.STOP)
    assert await mailbox.take() is None


async def test_merged_chunks_have_a_largest_size() -> None:
    mailbox = Mailbox(10**6)
    for token in range(MAX_MERGED_WEIGHT):
        mailbox.put(Chunk((token,)))
    first, second = await mailbox.take(), await mailbox.take()
    assert first is not None
    assert second is not None
    assert first.token_ids + second.token_ids == tuple(range(MAX_MERGED_WEIGHT))


async def test_the_consumer_waits_and_a_cancelled_wait_loses_nothing() -> None:
    mailbox = Mailbox(100)
    waiting = asyncio.create_task(mailbox.take())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    waiting = asyncio.create_task(mailbox.take())
    await asyncio.sleep(0)
    mailbox.put(Chunk((1,)))
    assert await waiting == Chunk((1,))


async def test_an_error_comes_after_what_came_before_it() -> None:
    mailbox = Mailbox(100)
    mailbox.put(Chunk((1,)))
    mailbox.close(EngineLost("gone"))
    mailbox.close()
    mailbox.put(Chunk((2,)))
    assert await mailbox.take() == Chunk((1,))
    for _ in range(2):
        with pytest.raises(EngineLost):
            await mailbox.take()


async def test_overflow_fails_the_consumer_only() -> None:
    mailbox = Mailbox(5)
    mailbox.put(Chunk(tuple(range(9))))
    assert mailbox.closed
    assert await mailbox.take() == Chunk(tuple(range(9)))
    with pytest.raises(SlowConsumer):
        await mailbox.take()


async def test_empty_chunks_take_room_too() -> None:
    mailbox = Mailbox(5)
    for _ in range(6):
        mailbox.put(Chunk())
    assert mailbox.closed


async def test_each_gives_what_is_there_and_then_what_comes_in_the_turn_in_which_it_comes() -> None:
    mailbox, seen = Mailbox(100), list[tuple[int, ...]]()

    def take(chunk: Chunk) -> bool:
        seen.append(chunk.token_ids)
        return True

    mailbox.put(Chunk((1,)))
    reading = asyncio.create_task(mailbox.each(take))
    await asyncio.sleep(0)
    assert seen == [(1,)]
    mailbox.put(Chunk((2,)))
    mailbox.put(Chunk((3,)))
    assert seen == [(1,), (2,), (3,)]
    mailbox.close()
    assert await reading
    assert await mailbox.each(take)


async def test_each_ends_when_no_more_is_wanted_and_what_comes_then_waits() -> None:
    mailbox, seen = Mailbox(100), list[tuple[int, ...]]()

    def take(chunk: Chunk) -> bool:
        seen.append(chunk.token_ids)
        return False

    for first, second in ((1, 2), (3, 4)):  # what is there, and what comes
        if first == 1:
            mailbox.put(Chunk((first,)))
        reading = asyncio.create_task(mailbox.each(take))
        await asyncio.sleep(0)
        if first == 3:
            mailbox.put(Chunk((first,)))
        mailbox.put(Chunk((second,)))
        assert not await reading
        assert await mailbox.take() == Chunk((second,))
    assert seen == [(1,), (3,)]


async def test_an_error_that_comes_when_no_more_is_wanted_is_the_next_readers() -> None:
    mailbox = Mailbox(100)
    reading = asyncio.create_task(mailbox.each(lambda chunk: False))
    await asyncio.sleep(0)
    mailbox.put(Chunk((1,)))
    mailbox.close(EngineLost("gone"))
    assert not await reading
    with pytest.raises(EngineLost):
        await mailbox.each(lambda chunk: True)


async def test_what_taking_raises_is_the_consumers_and_ends_it() -> None:
    def take(chunk: Chunk) -> bool:
        raise ZeroDivisionError

    mailbox = Mailbox(100)
    reading = asyncio.create_task(mailbox.each(take))
    await asyncio.sleep(0)
    mailbox.put(Chunk((1,)))
    assert mailbox.closed
    with pytest.raises(ZeroDivisionError):
        await reading


async def test_a_cancelled_each_loses_nothing() -> None:
    mailbox, seen = Mailbox(100), list[tuple[int, ...]]()

    def take(chunk: Chunk) -> bool:
        seen.append(chunk.token_ids)
        return True

    reading = asyncio.create_task(mailbox.each(take))
    await asyncio.sleep(0)
    mailbox.put(Chunk((1,)))
    reading.cancel()
    await asyncio.wait({reading})
    mailbox.put(Chunk((2,)))
    assert await mailbox.take() == Chunk((2,))
    assert seen == [(1,)]
