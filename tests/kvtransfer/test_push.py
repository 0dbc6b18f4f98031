"""Pushes that wait: for a counter that stands still, for a copy that is under way."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator

import numpy as np
import pytest
import pytest_asyncio
from microserve.kvtransfer.v1 import kvtransfer_pb2 as pb
from microserve.types.v1 import kv_pb2

from services.kvtransfer.config import KvTransferConfig
from services.kvtransfer.links import Links
from services.kvtransfer.transports import shm
from services.protocol.errors import Code, ServiceError
from tests.kvtransfer.engine import FakeEngine, Shape
from tests.kvtransfer.oracle import expected
from tests.kvtransfer.pattern import POISON
from tests.kvtransfer.port import PATIENCE_S, DirectPort

PAIR = tuple[FakeEngine, FakeEngine]
THREADS = KvTransferConfig().copy_threads


@pytest_asyncio.fixture(loop_scope="session")
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[PAIR]:
    """A sender with a pattern and a receiver, on a service with the options of the test's parameter."""
    port = DirectPort(**getattr(request, "param", {}))
    sender, receiver = FakeEngine(port, "p"), FakeEngine(port, "d")
    yield await sender.start(seed=1), await receiver.start()
    sender.close()
    receiver.close()
    await port.close()


class Brake:
    """Stops every copy before its bytes move, until it is let go. `begun`: all copying threads stand here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self._go_on = asyncio.Event(), threading.Event()
        self.copies = 0
        counting = threading.Lock()
        loop, copy_piece = asyncio.get_running_loop(), shm.copy_piece

        def braked(*arguments: object) -> None:
            with counting:
                self.copies += 1
                if self.copies == THREADS:
                    loop.call_soon_threadsafe(self.begun.set)
            assert self._go_on.wait(PATIENCE_S)
            copy_piece(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(shm, "copy_piece", braked)

    def let_go(self) -> None:
        self._go_on.set()


async def until_waiting(task: asyncio.Task[object]) -> None:
    """Lets the task run as far as it can without an event from outside."""
    for _ in range(10):
        await asyncio.sleep(0)
    assert not task.done()


@pytest.mark.parametrize("pair", [{"push_stall_timeout_s": 0.01}], indirect=True)
async def test_a_counter_that_stands_still(pair: PAIR, monkeypatch: pytest.MonkeyPatch) -> None:
    sender, receiver = pair
    address = await receiver.grant("r", 0, 8, [4, 5])
    sender.pool.raise_ready(0, 1)
    with pytest.raises(ServiceError) as caught:
        await sender.push(sender.order(address, 0, 8, [1, 2], ready_slot=0)).done()
    assert (caught.value.code, caught.value.reason) == (Code.DEADLINE_EXCEEDED, "PUSH_STALLED")
    # The attempt is still its writer's, who has time from now on.
    monkeypatch.setattr(sender.port.service._pushes, "_stall_timeout_s", PATIENCE_S)  # type: ignore[attr-defined]
    await sender.push(sender.order(address, 0, 8, [1, 2])).done()


async def test_revoke_waits_for_the_copy_under_way(pair: PAIR, monkeypatch: pytest.MonkeyPatch) -> None:
    """And for no more than that: the copies that follow never begin."""
    sender, receiver = pair
    brake = Brake(monkeypatch)
    address = await receiver.grant("r", 0, 8, [4, 5])
    push = sender.push(sender.order(address, 0, 8, [1, 2]))
    await brake.begun.wait()
    revoking = asyncio.create_task(receiver.revoke("r"))
    await until_waiting(revoking)
    begun = brake.copies
    brake.let_go()
    await revoking
    receiver.memory[:] = POISON
    with pytest.raises(ServiceError) as caught:
        await push.done()
    assert caught.value.reason == "RESERVATION_GONE"
    assert (receiver.memory == POISON).all()
    # One a thread was under way.
    assert brake.copies == begun == THREADS


async def test_end_attempt_waits_for_the_copy_under_way(pair: PAIR, monkeypatch: pytest.MonkeyPatch) -> None:
    sender, receiver = pair
    brake = Brake(monkeypatch)
    address = await receiver.grant("r", 0, 8, [4, 5])
    order = sender.order(address, 0, 8, [1, 2])
    push = sender.push(order)
    await brake.begun.wait()
    # Without a wire in between even the caller that leaves waits; over a wire only the second one does.
    leaving = asyncio.create_task(push.close())
    ending = asyncio.create_task(sender.end_attempt(order))
    await until_waiting(leaving)
    await until_waiting(ending)
    brake.let_go()
    assert await ending is False
    await leaving
    sender.memory[:] = 0
    assert not (receiver.memory == 0).any()


async def test_a_new_engine_waits_for_copies_of_the_old_one(pair: PAIR, monkeypatch: pytest.MonkeyPatch) -> None:
    """AttachPool replies when neither side's copies are under way."""
    sender, receiver = pair
    brake = Brake(monkeypatch)
    address = await receiver.grant("r", 0, 8, [4, 5])
    push = sender.push(sender.order(address, 0, 8, [1, 2]))
    await brake.begun.wait()
    for engine in (sender, receiver):
        engine.close()
        attaching = asyncio.create_task(engine.attach())
        await until_waiting(attaching)
        attaching.cancel()
        await asyncio.wait([attaching])
    brake.let_go()
    for engine in (sender, receiver):
        await engine.attach()
    with pytest.raises(ServiceError) as caught:
        await push.done()
    assert caught.value.reason in ("ENGINE_GONE", "RESERVATION_GONE")


async def test_a_superseded_copy_ends_before_the_next_attempt_begins(
    pair: PAIR, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender, receiver = pair
    brake = Brake(monkeypatch)
    before = receiver.memory.copy()
    address = await receiver.grant("r", 0, 8, [4, 5])
    old = sender.push(sender.order(address, 0, 8, [1, 2]))
    await brake.begun.wait()
    begun = brake.copies
    new = sender.push(sender.order(address, 0, 8, [8, 9], attempt=2, writer_id="other"))
    for _ in range(10):
        await asyncio.sleep(0)
    assert brake.copies == begun
    brake.let_go()
    await new.done()
    with pytest.raises(ServiceError) as caught:
        await old.done()
    assert caught.value.reason == "ATTEMPT_SUPERSEDED"
    np.testing.assert_array_equal(receiver.memory, expected(before, receiver, sender, 0, 8, [8, 9], [4, 5]))


async def test_a_copy_that_fails_ends_its_push_and_nothing_else(pair: PAIR, monkeypatch: pytest.MonkeyPatch) -> None:
    sender, receiver = pair

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    address = await receiver.grant("r", 0, 8, [4, 5])
    with monkeypatch.context() as context:
        context.setattr(shm, "copy_piece", broken)
        with pytest.raises(ZeroDivisionError):
            await sender.push(sender.order(address, 0, 8, [1, 2])).done()
    # The threads live, and nothing is left under way.
    assert (await sender.push(sender.order(address, 0, 8, [1, 2])).done()).layers_done == 3
    await receiver.revoke("r")


async def test_closing_the_service_ends_its_pushes() -> None:
    port = DirectPort()
    sender, receiver = FakeEngine(port, "p", Shape()), FakeEngine(port, "d", Shape())
    await sender.start(seed=1)
    await receiver.start()
    address = await receiver.grant("r", 0, 8, [4, 5])
    push = sender.push(sender.order(address, 0, 8, [1, 2], ready_slot=0))
    await push.opened()
    await port.close()
    with pytest.raises(ServiceError) as caught:
        await push.done()
    assert caught.value.reason == "DRAINING"
    assert sender.pool.service_is_gone()
    sender.close()
    receiver.close()


@pytest.mark.parametrize("pair", [{"checksums": True}], indirect=True)
async def test_a_copy_that_is_not_like_its_source(pair: PAIR, monkeypatch: pytest.MonkeyPatch) -> None:
    """With checksums on it is DATA_LOSS, and the range does not count."""
    sender, receiver = pair
    copy_piece = shm.copy_piece

    def flipped(*arguments: object) -> None:
        copy_piece(*arguments)  # type: ignore[arg-type]
        # Not turned over: two copies at once would turn it back.
        receiver.tokens[1, 4, 0, 0, 0] = sender.tokens[1, 1, 0, 0, 0] ^ 1

    address = await receiver.grant("r", 0, 8, [4, 5])
    with monkeypatch.context() as context:
        context.setattr(shm, "copy_piece", flipped)
        with pytest.raises(ServiceError) as caught:
            await sender.push(sender.order(address, 0, 8, [1, 2])).done()
    assert (caught.value.code, caught.value.reason) == (Code.DATA_LOSS, "CHECKSUM_MISMATCH")
    assert (await sender.push(sender.order(address, 0, 8, [1, 2], attempt=2)).done()).bytes > 0


@pytest.mark.parametrize("pair", [{"checksums": True}], indirect=True)
async def test_a_part_that_is_sent_again_counts_anew(pair: PAIR, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the second sending spoilt is not in place, though the first one had been."""
    sender, receiver = pair
    copy_piece = shm.copy_piece

    def flipped(*arguments: object) -> None:
        copy_piece(*arguments)  # type: ignore[arg-type]
        # Not turned over: two copies at once would turn it back.
        receiver.tokens[1, 4, 0, 0, 0] = sender.tokens[1, 1, 0, 0, 0] ^ 1

    before = receiver.memory.copy()
    address = await receiver.grant("r", 0, 8, [4, 5])
    whole = kv_pb2.TokenRange(begin=0, end=8)
    first = sender.order(address, 0, 4, [1], attempt_range=whole)
    last = sender.order(address, 4, 8, [2], attempt_range=whole)
    assert (await sender.push(first).done()).state == pb.PUSH_STATE_DONE
    with monkeypatch.context() as context:
        context.setattr(shm, "copy_piece", flipped)
        with pytest.raises(ServiceError) as caught:
            await sender.push(first).done()
    assert caught.value.reason == "CHECKSUM_MISMATCH"
    assert (await sender.push(last).done()).state == pb.PUSH_STATE_DONE
    assert (await sender.push(first).done()).state == pb.PUSH_STATE_COMMITTED
    np.testing.assert_array_equal(receiver.memory, expected(before, receiver, sender, 0, 8, [1, 2], [4, 5]))


async def test_a_cleanup_that_fails_is_logged(pair: PAIR, monkeypatch: pytest.MonkeyPatch) -> None:
    logged = asyncio.get_running_loop().create_future()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage() == "task failed":
                logged.set_result(record.exc_info)

    async def fail(*arguments: object) -> bool:
        raise RuntimeError("a bug")

    sender, receiver = pair
    order = sender.order(await receiver.grant("r", 0, 8, [4, 5]), 0, 4, [1])
    order.attempt_range.end = 8  # so the attempt stays open
    await sender.push(order).done()
    monkeypatch.setattr(Links, "end_attempt", fail)
    monkeypatch.setattr(logging.getLogger("services.rpc.log"), "handlers", [Listener()])
    sender.close()
    kind, error, _ = await asyncio.wait_for(logged, PATIENCE_S)
    assert (kind, str(error)) == (RuntimeError, "a bug")
