"""Pools of this service as peers may read them."""

from __future__ import annotations

import asyncio

import pytest

from services.kvtransfer.transports.nixl.poller import Poller
from services.kvtransfer.transports.nixl.source import NixlSource
from services.kvtransfer.transports.pull.probing import make_probe_memory
from tests.kvtransfer.nixl.fake_agent import FakeAgent, make_world


async def test_two_first_pushes_out_of_a_pool_share_its_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers refuse a second agent of a name that they know."""
    world, poller, pool = make_world(monkeypatch), Poller(), make_probe_memory()
    made: list[str] = []

    def make_agent(name: str) -> FakeAgent:
        made.append(name)
        return FakeAgent(world, name)

    source = NixlSource(poller, make_agent, b"epoch")

    async def offer() -> bytes:
        async with source.serve(pool, "there:1") as served:
            return served.offer

    first, second = await asyncio.gather(offer(), offer())
    assert first == second
    assert len(made) == 1
    assert pool.memory is not None
    pool.memory.close()
    poller.close()
