"""After a fence is acknowledged nothing is written: revoke, cancel, a later attempt, a lost push."""

from __future__ import annotations

import numpy as np
import pytest
from microserve.kvtransfer.v1 import kvtransfer_pb2 as pb
from microserve.types.v1 import kv_pb2

from services.protocol.errors import ServiceError
from tests.kvtransfer.conftest import StartEngine
from tests.kvtransfer.engine import FakeEngine, Shape
from tests.kvtransfer.oracle import expected
from tests.kvtransfer.pattern import POISON
from tests.kvtransfer.streams import Pushing

# 24 MiB in scattered pages: long enough that a call comes in the middle. Their last layer is held back, so that a push
# cannot be over before.
LARGE = Shape(layers=6, heads=8, head_dim=128, page_size=8, pages=64)
TOKENS = 8 * 64


async def _fails(push: Pushing) -> str:
    with pytest.raises(ServiceError) as caught:
        await push.done()
    return caught.value.reason


async def _large_push(start_engine: StartEngine) -> tuple[FakeEngine, FakeEngine, pb.PushRequest]:
    sender, receiver = await start_engine("p", LARGE, seed=1), await start_engine("d", LARGE)
    pages = list(range(64))
    address = await receiver.grant("r", 0, TOKENS, pages[::-1])
    sender.pool.raise_ready(0, LARGE.layers - 1)
    return sender, receiver, sender.order(address, 0, TOKENS, pages, ready_slot=0)


async def test_revoke_while_bytes_move(start_engine: StartEngine) -> None:
    sender, receiver, order = await _large_push(start_engine)
    push = sender.push(order)
    await push.opened()
    await receiver.revoke("r")
    # The receiver may use its pages again from now on.
    receiver.memory[:] = POISON
    assert await _fails(push) == "RESERVATION_GONE"
    assert (receiver.memory == POISON).all()


async def test_revoke_while_the_counter_is_held(start_engine: StartEngine) -> None:
    sender, receiver = await start_engine("p", seed=1), await start_engine("d")
    before = receiver.memory.copy()
    address = await receiver.grant("r", 0, 8, [4, 5])
    push = sender.push(sender.order(address, 0, 8, [1, 2], ready_slot=0))
    sender.pool.raise_ready(0, 2)
    await push.layers(2)
    await receiver.revoke("r")
    # It ends although its counter does not move.
    assert await _fails(push) == "RESERVATION_GONE"
    wanted = expected(before, receiver, sender, 0, 8, [1, 2], [4, 5], layers=2)
    np.testing.assert_array_equal(receiver.memory, wanted)


async def test_revoke_is_for_good(start_engine: StartEngine) -> None:
    sender, receiver = await start_engine("p", seed=1), await start_engine("d")
    await receiver.revoke("never granted")
    with pytest.raises(ServiceError) as caught:
        await receiver.grant("never granted", 0, 8, [4, 5])
    assert caught.value.reason == "RESERVATION_GONE"
    address = await receiver.grant("r", 0, 8, [4, 5])
    await receiver.revoke("r")
    await receiver.revoke("r")
    assert await _fails(sender.push(sender.order(address, 0, 8, [1, 2]))) == "RESERVATION_GONE"
    # Its pages are free.
    await receiver.grant("next", 0, 8, [4, 5])


async def test_revoke_brings_the_last_word_on_what_is_committed(start_engine: StartEngine) -> None:
    sender, receiver = await start_engine("p", seed=1), await start_engine("d")
    assert list((await receiver.revoke("never granted")).committed) == []
    address = await receiver.grant("r", 0, 12, [4, 5, 6])
    await sender.push(sender.order(address, 0, 8, [1, 2])).done()
    for _ in range(2):  # the first reply may be lost
        assert list((await receiver.revoke("r")).committed) == [kv_pb2.TokenRange(begin=0, end=8)]
    with pytest.raises(ServiceError):
        await receiver.grant("r", 0, 12, [4, 5, 6])
    assert list((await receiver.revoke("r")).committed) == [kv_pb2.TokenRange(begin=0, end=8)]


async def test_cancel_while_bytes_move(start_engine: StartEngine) -> None:
    """A client that leaves hears no more, so EndAttempt is what makes it certain."""
    sender, receiver, order = await _large_push(start_engine)
    push = sender.push(order)
    await push.opened()
    await push.close()
    assert not await sender.end_attempt(order)
    # Nothing is read or written any more; whoever comes next finds nobody in the way.
    sender.memory[:] = 0
    receiver.memory[:] = POISON
    again = sender.order(order.target, 0, TOKENS, list(order.page_ids), attempt=2)
    await sender.push(again).done()
    assert (receiver.memory == 0).all()


async def test_end_attempt_burns_its_number(start_engine: StartEngine) -> None:
    """A push that was overtaken by its own EndAttempt finds no open door."""
    sender, receiver = await start_engine("p", seed=1), await start_engine("d")
    address = await receiver.grant("r", 0, 8, [4, 5])
    order = sender.order(address, 0, 8, [1, 2])
    assert not await sender.end_attempt(order)
    assert await _fails(sender.push(order)) == "ATTEMPT_SUPERSEDED"
    await sender.push(sender.order(address, 0, 8, [1, 2], attempt=2)).done()


async def test_end_attempt_after_the_commit(start_engine: StartEngine) -> None:
    sender, receiver = await start_engine("p", seed=1), await start_engine("d")
    address = await receiver.grant("r", 0, 8, [4, 5])
    order = sender.order(address, 0, 8, [1, 2])
    await sender.push(order).done()
    assert await sender.end_attempt(order)


async def test_end_attempt_after_the_reservation(start_engine: StartEngine) -> None:
    sender, receiver = await start_engine("p", seed=1), await start_engine("d")
    address = await receiver.grant("r", 0, 8, [4, 5])
    order = sender.order(address, 0, 8, [1, 2], ready_slot=0)
    push = sender.push(order)
    await push.opened()
    await receiver.revoke("r")
    assert not await sender.end_attempt(order)
    assert await _fails(push) in ("RESERVATION_GONE", "PUSH_CANCELLED")


async def test_end_attempt_ends_its_push(start_engine: StartEngine) -> None:
    sender, receiver = await start_engine("p", seed=1), await start_engine("d")
    before = receiver.memory.copy()
    address = await receiver.grant("r", 0, 8, [4, 5])
    order = sender.order(address, 0, 8, [1, 2], ready_slot=0)
    push = sender.push(order)
    await push.opened()
    assert not await sender.end_attempt(order)
    assert await _fails(push) == "PUSH_CANCELLED"
    sender.pool.raise_ready(0, 3)
    np.testing.assert_array_equal(receiver.memory, before)


@pytest.mark.slow
async def test_a_later_attempt_takes_over(start_engine: StartEngine) -> None:
    first, second, receiver = (
        await start_engine("p", LARGE, seed=1),
        await start_engine("q", LARGE, seed=2),
        await start_engine("d", LARGE),
    )
    before = receiver.memory.copy()
    pages = list(range(64))
    address = await receiver.grant("r", 0, TOKENS, pages)
    first.pool.raise_ready(0, LARGE.layers - 1)
    old = first.push(first.order(address, 0, TOKENS, pages, ready_slot=0))
    await old.opened()
    await second.push(second.order(address, 0, TOKENS, pages[::-1], attempt=2)).done()
    assert await _fails(old) == "ATTEMPT_SUPERSEDED"
    # All of one, nothing of the other.
    wanted = expected(before, receiver, second, 0, TOKENS, pages[::-1], pages)
    np.testing.assert_array_equal(receiver.memory, wanted)


async def test_a_later_attempt_takes_over_a_held_one(start_engine: StartEngine) -> None:
    sender, receiver = await start_engine("p", seed=1), await start_engine("d")
    before = receiver.memory.copy()
    address = await receiver.grant("r", 0, 8, [4, 5])
    old = sender.push(sender.order(address, 0, 8, [1, 2], ready_slot=0, writer_id="one"))
    sender.pool.raise_ready(0, 1)
    await old.layers(1)
    new = sender.push(sender.order(address, 0, 8, [8, 9], attempt=2, writer_id="two"))
    assert await _fails(old) == "ATTEMPT_SUPERSEDED"
    await new.done()
    sender.pool.raise_ready(0, 3)
    np.testing.assert_array_equal(receiver.memory, expected(before, receiver, sender, 0, 8, [8, 9], [4, 5]))
    late = sender.push(sender.order(address, 0, 8, [1, 2], attempt=1, writer_id="one"))
    assert (await late.done()).bytes == 0


async def test_the_same_push_again_replaces_the_first(start_engine: StartEngine) -> None:
    """As after a broken connection, when the first still runs."""
    sender, receiver = await start_engine("p", seed=1), await start_engine("d")
    before = receiver.memory.copy()
    address = await receiver.grant("r", 0, 8, [4, 5])
    order = sender.order(address, 0, 8, [1, 2], ready_slot=0)
    first = sender.push(order)
    sender.pool.raise_ready(0, 1)
    await first.layers(1)
    second = sender.push(order)
    assert await _fails(first) == "PUSH_CANCELLED"
    await second.layers(1)
    sender.pool.raise_ready(0, 3)
    assert (await second.done()).state == pb.PUSH_STATE_COMMITTED
    np.testing.assert_array_equal(receiver.memory, expected(before, receiver, sender, 0, 8, [1, 2], [4, 5]))
