"""Random pushes, revokes, superseding attempts and deaths: acknowledged fences hold, and nothing is left over."""

from __future__ import annotations

import asyncio
import random

import pytest

from services.protocol.errors import ServiceError
from tests.kvtransfer.engine import FakeEngine, Shape
from tests.kvtransfer.pattern import POISON
from tests.kvtransfer.port import PATIENCE_S, DirectPort

# 8 KiB a page of a layer, 64 pages in all.
SHAPE = Shape(layers=8, heads=2, head_dim=64, page_size=8, pages=64)
LANES, PAGES, ROUNDS = 6, 8, 25
EXPECTED = {"RESERVATION_GONE", "ATTEMPT_SUPERSEDED", "PUSH_CANCELLED", "ENGINE_GONE"}


async def one_lane(lane: int, sender: FakeEngine, receiver: FakeEngine) -> set[str]:
    """Reservation after reservation on pages of its own. Returns the reasons for which pushes failed."""
    dice, reasons = random.Random(lane), set[str]()
    pages = list(range(lane * PAGES, (lane + 1) * PAGES))
    view = receiver.tokens[:, pages[0] : pages[-1] + 1]
    for number in range(ROUNDS):
        view[:] = POISON
        begin, end = sorted(dice.sample(range(PAGES * SHAPE.page_size + 1), 2))
        first, last = begin // SHAPE.page_size, (end - 1) // SHAPE.page_size
        mine = dice.sample(pages, last - first + 1)
        address = await receiver.grant(f"{lane}-{number}", begin, end, mine)
        pushes = []
        for attempt in range(1, dice.randint(1, 3) + 1):
            sources = dice.sample(range(SHAPE.pages), len(mine))
            order = sender.order(address, begin, end, sources, attempt=attempt, writer_id=f"{lane}-{attempt}")
            pushes.append((sender.push(order), order))
            for _ in range(dice.randrange(12)):
                await asyncio.sleep(0)
        action = dice.choice(["wait", "revoke", "end", "leave"])
        if action == "wait":
            await pushes[-1][0].done()
            assert not (view[:, [page - pages[0] for page in mine[1:-1]]] == POISON).any()
        elif action == "end":
            await sender.end_attempt(pushes[-1][1])
        elif action == "leave":
            await pushes[-1][0].close()
        await receiver.revoke(f"{lane}-{number}")
        # Acknowledged: the pages are the receiver's own again.
        view[:] = POISON
        for push, _ in pushes:
            try:
                await push.done()
            except ServiceError as error:
                reasons.add(error.reason)
            except asyncio.CancelledError:
                assert action == "leave"
        assert (view == POISON).all()
    return reasons


@pytest.mark.slow
async def test_fences_hold_under_load() -> None:
    port = DirectPort(copy_threads=3, max_copy_bytes=20_000)
    sender, receiver = FakeEngine(port, "p", SHAPE), FakeEngine(port, "d", SHAPE)
    await sender.start(seed=1)
    await receiver.start()
    async with asyncio.timeout(PATIENCE_S):
        reasons = await asyncio.gather(*(one_lane(lane, sender, receiver) for lane in range(LANES)))
    assert set().union(*reasons) <= EXPECTED
    stats = port.service.stats()
    assert [(pool.grants, pool.pushes) for pool in stats.pools] == [(0, 0), (0, 0)]
    sender.close()
    receiver.close()
    await port.close()
