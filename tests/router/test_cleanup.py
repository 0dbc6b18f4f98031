"""Work that outlives its request is waited for, and streams that break leave no half-known state."""

from __future__ import annotations

import asyncio

from services.router.cleanup import Cleanup
from services.router.fleet.cached_blocks import CachedBlocks, KvEvent


async def test_drain_waits_for_what_tasks_begin() -> None:
    cleanup, begun, gate = Cleanup(5.0), asyncio.Event(), asyncio.Event()

    async def child() -> None:
        begun.set()
        await gate.wait()

    async def parent() -> None:
        cleanup.spawn("child", child())

    cleanup.spawn("parent", parent())
    draining = asyncio.create_task(cleanup.drain())
    await begun.wait()
    for _ in range(5):
        await asyncio.sleep(0)  # lets the drain see that the parent has ended
    assert not draining.done()
    gate.set()
    await draining


def test_half_a_snapshot_is_forgotten_when_the_stream_begins_anew() -> None:
    blocks, gone, there = CachedBlocks(), b"a" * 16, b"b" * 16
    blocks.apply(KvEvent(1, snapshot=True, snapshot_complete=False, stored=(gone,), removed=()))
    blocks.resync()
    blocks.apply(KvEvent(9, snapshot=True, snapshot_complete=True, stored=(there,), removed=()))
    assert len(blocks) == 1
