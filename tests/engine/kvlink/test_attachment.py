"""Answers of the link to the transfer service, over a client that does what the test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from services.engine.core.api import Command, GrantDrained, GrantOpened, PushEnded
from services.engine.core.ports import GrantSpec, PushSpec
from services.engine.kvlink.attachment import Attachment
from services.engine.kvlink.client import GrantCondition, PoolRef, PushProgress, TransferClient
from services.protocol.address import KvAddress
from services.protocol.layout import Dtype, PageLayout
from services.protocol.ranges import RangeSet, TokenRange

LAYOUT = PageLayout(layer_count=1, kv_head_count=1, head_dim=1, page_size=1, dtype=Dtype.FLOAT32)
RANGE = TokenRange(0, 1)
TARGET = KvAddress("r", "here:1", b"e" * 16, b"s" * 16, RANGE, (), LAYOUT, b"m" * 16, b"p" * 16)


class SilentService(TransferClient):
    """Takes every call and says nothing before it is told to."""

    def __init__(self) -> None:
        self.may_open = asyncio.Event()
        self.ended: list[PushSpec] = []
        self.committed = RangeSet()

    async def watch_grants(self, pool: PoolRef) -> AsyncIterator[list[GrantCondition]]:
        await asyncio.Event().wait()
        yield []

    async def push(self, pool: PoolRef, spec: PushSpec) -> AsyncIterator[PushProgress]:
        await asyncio.Event().wait()
        raise AssertionError
        yield

    async def end_attempt(self, pool: PoolRef, spec: PushSpec) -> bool:
        self.ended.append(spec)
        return False

    async def grant(self, pool: PoolRef, spec: GrantSpec) -> None:
        await self.may_open.wait()

    async def revoke(self, pool: PoolRef, reservation_id: str) -> RangeSet:
        return self.committed


def fail(error: BaseException) -> None:
    pytest.fail(f"a task of the link failed: {error!r}")


async def answer(said: asyncio.Queue[Command]) -> Command:
    async with asyncio.timeout(60):
        return await said.get()


@pytest.mark.parametrize("by_writer", [False, True])
async def test_a_cancel_right_behind_its_push_counts(by_writer: bool) -> None:
    said: asyncio.Queue[Command] = asyncio.Queue()
    service = SilentService()
    link = Attachment(service, PoolRef("p", b"e" * 16), said.put_nowait, fail)
    spec = PushSpec(1, (0,), RANGE, TARGET, 1, RANGE, "writer", None)
    link.push(spec)
    if by_writer:
        link.cancel_writer("writer")
    else:
        link.cancel_push(1)
    ended = await answer(said)
    assert isinstance(ended, PushEnded)
    assert ended.error is not None
    assert service.ended == [spec], "the service must say that it reads the pages no more"
    await link.lost()


async def test_a_grant_that_is_revoked_while_it_opens_is_forgotten() -> None:
    said: asyncio.Queue[Command] = asyncio.Queue()
    service = SilentService()
    link = Attachment(service, PoolRef("p", b"e" * 16), said.put_nowait, fail)
    link.grant(GrantSpec("gone", b"s" * 16, RANGE, (0,)))
    link.revoke("gone")
    assert await answer(said) == GrantDrained("gone")
    link.grant(GrantSpec("kept", b"s" * 16, RANGE, (0,)))
    service.may_open.set()
    assert await answer(said) == GrantOpened("kept")
    assert set(link._received) == {"kept"}
    await link.lost()


async def test_a_drained_grant_comes_with_all_that_was_committed() -> None:
    said: asyncio.Queue[Command] = asyncio.Queue()
    service = SilentService()
    service.committed = RangeSet.of([RANGE])
    link = Attachment(service, PoolRef("p", b"e" * 16), said.put_nowait, fail)
    link.revoke("r")  # the watch has said nothing
    assert await answer(said) == GrantDrained("r", RangeSet.of([RANGE]))
    await link.lost()
