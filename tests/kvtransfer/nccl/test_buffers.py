"""Buffers that calls under way hold, and what becomes of them."""

from __future__ import annotations

import asyncio

import pytest

from services.kvtransfer.errors import PeerLost
from services.kvtransfer.transports.nccl import buffers as buffers_module
from services.kvtransfer.transports.nccl.buffers import Buffer, Buffers
from services.kvtransfer.transports.nccl.communicator import CommunicatorLost
from tests.kvtransfer.cuda.fake_device import FakeDevice
from tests.kvtransfer.port import PATIENCE_S


@pytest.fixture
def one(monkeypatch: pytest.MonkeyPatch) -> Buffers:
    """Buffers of which there is one."""
    monkeypatch.setattr(buffers_module, "NUM_BUFFERS", 1)
    return Buffers(FakeDevice(), 64)


def _ended(outcome: Exception | None = None) -> asyncio.Future[None]:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    if outcome is None:
        future.set_result(None)
    else:
        future.set_exception(outcome)
    return future


async def _use(buffers: Buffers) -> int:
    async with asyncio.timeout(PATIENCE_S), buffers.used_by(lambda _: _ended()) as buffer:
        return buffer.address()


async def test_a_call_that_cannot_begin_gives_its_buffer_back(one: Buffers) -> None:
    def refuse(buffer: Buffer) -> asyncio.Future[None]:
        raise RuntimeError("the thread has ended")

    with pytest.raises(RuntimeError):
        async with one.used_by(refuse):
            pass
    assert await _use(one) == await _use(one)


async def test_a_call_that_may_still_write_keeps_its_buffer(one: Buffers) -> None:
    for drained in (True, False):
        assert not one.are_spent
        lost = CommunicatorLost("no answer", drained=drained)
        with pytest.raises(PeerLost, match="no answer"):
            async with one.used_by(lambda _, lost=lost: _ended(lost)):
                pass
        await asyncio.sleep(0)  # what was to be done at the end of the call is done
    assert one.are_spent
