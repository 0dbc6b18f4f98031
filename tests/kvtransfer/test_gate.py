"""The gate waits for copies that are under way, and for nothing else."""

from __future__ import annotations

import asyncio

import pytest

from services.kvtransfer.errors import NotDrained
from services.kvtransfer.gate import Gate
from services.protocol.errors import AttemptSuperseded, ReservationGone
from services.protocol.grants import AlreadyCommitted, Attempt, GrantKey, GrantSpec, GrantState, GrantStatus
from services.protocol.ranges import TokenRange

KEY = GrantKey("pool", "r")
SECRET = b"s" * 16
WHOLE = TokenRange(0, 8)


class Rig:
    """A gate with one grant, and what it told."""

    def __init__(self, drain_timeout_s: float = 20.0) -> None:
        self.changes: list[GrantStatus] = []
        self.progress = 0
        self.gate = Gate(drain_timeout_s, self.changes.extend, self._progressed)
        self.gate.open_grant(GrantSpec(KEY, SECRET, WHOLE, (1, 2)))

    def _progressed(self) -> None:
        self.progress += 1

    async def attempt(self, number: int = 1, writer: str = "w") -> Attempt:
        opened = await self.gate.open_attempt(KEY, SECRET, WHOLE, number, writer)
        assert isinstance(opened, Attempt)
        return opened


async def until_waiting(task: asyncio.Task[object]) -> None:
    """Lets the task run as far as it can without an event from outside."""
    for _ in range(5):
        await asyncio.sleep(0)
    assert not task.done()


async def test_revoke_waits_for_the_copy_under_way() -> None:
    rig = Rig()
    attempt = await rig.attempt()
    rig.gate.begin_write(attempt, WHOLE)
    revoking = asyncio.create_task(rig.gate.revoke(KEY))
    await until_waiting(revoking)
    with pytest.raises(ReservationGone):
        rig.gate.begin_write(attempt, WHOLE)
    assert rig.gate.refused_writes == 1
    await asyncio.to_thread(rig.gate.end_write, attempt, 5)
    await revoking
    assert rig.changes[-1].state is GrantState.DRAINED
    assert rig.changes[-1].bytes == 5


async def test_revoke_is_bounded_and_stays_fenced() -> None:
    rig = Rig(drain_timeout_s=0.001)
    attempt = await rig.attempt()
    rig.gate.begin_write(attempt, WHOLE)
    with pytest.raises(NotDrained) as caught:
        await rig.gate.revoke(KEY)
    assert caught.value.retry_delay_s is not None
    rig.gate.end_write(attempt, 0)
    # Asking again is right.
    await rig.gate.revoke(KEY)


async def test_a_cancelled_revoke_stays_fenced() -> None:
    rig = Rig()
    attempt = await rig.attempt()
    rig.gate.begin_write(attempt, WHOLE)
    revoking = asyncio.create_task(rig.gate.revoke(KEY))
    await until_waiting(revoking)
    revoking.cancel()
    await asyncio.wait([revoking])
    assert isinstance(rig.gate.refusal(attempt), ReservationGone)
    rig.gate.end_write(attempt, 0)
    await rig.gate.revoke(KEY)


async def test_a_new_attempt_waits_for_the_old_one() -> None:
    rig = Rig()
    old = await rig.attempt(1)
    heard = []
    rig.gate.begin_write(old, WHOLE)
    with rig.gate.fence_listener(old, lambda: heard.append("fenced")):
        opening = asyncio.create_task(rig.gate.open_attempt(KEY, SECRET, WHOLE, 2, "other"))
        await until_waiting(opening)
        # The old one's push hears of it while it waits for its counter.
        assert heard
        assert isinstance(rig.gate.refusal(old), AttemptSuperseded)
        await asyncio.to_thread(rig.gate.end_write, old, 0)
        new = await opening
    assert isinstance(new, Attempt)
    assert new.number == 2


async def test_an_opening_that_is_cancelled_opens_nothing() -> None:
    rig = Rig()
    old = await rig.attempt(1)
    rig.gate.begin_write(old, WHOLE)
    opening = asyncio.create_task(rig.gate.open_attempt(KEY, SECRET, WHOLE, 2, "other"))
    await until_waiting(opening)
    opening.cancel()
    await asyncio.wait([opening])
    rig.gate.end_write(old, 0)
    await asyncio.sleep(0)
    assert rig.gate.statuses("pool")[0].state is GrantState.OPEN
    # The same number again is still unused.
    assert (await rig.attempt(2, "other")).number == 2


async def test_an_opening_that_waits_hears_of_the_revoke() -> None:
    rig = Rig()
    old = await rig.attempt(1)
    rig.gate.begin_write(old, WHOLE)
    opening = asyncio.create_task(rig.gate.open_attempt(KEY, SECRET, WHOLE, 2, "other"))
    await until_waiting(opening)
    revoking = asyncio.create_task(rig.gate.revoke(KEY))
    with pytest.raises(ReservationGone):
        await opening
    rig.gate.end_write(old, 0)
    await revoking


async def test_forgetting_a_pool_waits_for_its_writers() -> None:
    rig = Rig()
    attempt = await rig.attempt()
    rig.gate.begin_write(attempt, WHOLE)
    rig.gate.fence_pool("pool")
    forgetting = asyncio.create_task(rig.gate.forget_pool("pool"))
    await until_waiting(forgetting)
    await asyncio.to_thread(rig.gate.end_write, attempt, 0)
    await forgetting
    # Even the tombstone is gone: the id may be used by the pool's next engine.
    rig.gate.open_grant(GrantSpec(KEY, SECRET, WHOLE, (1, 2)))


async def test_ending_an_attempt_waits_for_its_copies() -> None:
    rig = Rig()
    attempt = await rig.attempt()
    rig.gate.begin_write(attempt, WHOLE)
    ending = asyncio.create_task(rig.gate.end_attempt(KEY, SECRET, WHOLE, 1, "w"))
    await until_waiting(ending)
    rig.gate.end_write(attempt, 0)
    assert await ending is False


async def test_a_commit_stands() -> None:
    rig = Rig()
    attempt = await rig.attempt()
    assert rig.gate.mark_in_place(attempt, WHOLE)
    assert await rig.gate.end_attempt(KEY, SECRET, WHOLE, 1, "w")
    assert await rig.gate.open_attempt(KEY, SECRET, WHOLE, 9, "x") is AlreadyCommitted.VALUE


async def test_progress_is_told_once_until_it_is_taken() -> None:
    rig = Rig()
    attempt = await rig.attempt()
    for _ in range(3):
        rig.gate.begin_write(attempt, WHOLE)
        rig.gate.end_write(attempt, 7)
    await asyncio.sleep(0)
    assert rig.progress == 1
    assert [status.bytes for status in rig.gate.take_progress()] == [21]
    assert rig.gate.take_progress() == ()
