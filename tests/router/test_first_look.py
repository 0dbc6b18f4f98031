"""When a router that has just started says that it serves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager

import pytest

from services.router import app
from services.router.app import Router
from services.router.config import RouterConfig
from services.router.fleet.member import Member
from tests.e2e.waiting import until
from tests.fakes import FakeEngine
from tests.router.harness import FAST, PATIENCE_S, model


class Held:
    """A router that was told of two engines, and hears of the second one when it may."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, first: FakeEngine, second: str) -> None:
        self.may_hear = asyncio.Event()
        self.router = Router(RouterConfig(listen="127.0.0.1:0", engine=(first.address, second)), backoff=FAST)
        self.changed = asyncio.Event()
        make = self.router._member

        def made(address: str) -> Member:
            member = make(address)
            if address == second:
                watch = member.client.watch_health
                monkeypatch.setattr(member.client, "watch_health", lambda: self._late(watch))
            return member

        self.router.membership._make_member = made

    async def _late(self, watch: Callable[[], AsyncGenerator[bool, None]]) -> AsyncGenerator[bool, None]:
        await self.may_hear.wait()
        async with aclosing(watch()) as changes:
            async for serving in changes:
                yield serving

    async def until(self, num_healthy: int) -> None:
        """So many engines have joined."""
        async with asyncio.timeout(PATIENCE_S):
            while sum(member.healthy for member in self.router.registry.members.values()) != num_healthy:
                await self.changed.wait()
                self.changed.clear()

    async def serves(self) -> bool:
        """Whether it says that it does."""
        return self.router.serving


@asynccontextmanager
async def started(monkeypatch: pytest.MonkeyPatch, *, is_there: bool = True) -> AsyncIterator[Held]:
    """`is_there`: somebody listens at the second engine's address."""
    engines = [FakeEngine(model(), name) for name in "ab"]
    for engine in engines:
        await engine.start()
    if not is_there:
        await engines[1].stop()
    held = Held(monkeypatch, engines[0], engines[1].address)
    try:
        await held.router.start()
        held.router.registry.on_change(held.changed.set)
        yield held
    finally:
        await held.router.close()
        for engine in engines[: 1 + is_there]:
            await engine.stop()


async def test_it_has_heard_of_every_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the first request finds a pair."""
    monkeypatch.setattr(app, "FIRST_LOOK_S", PATIENCE_S)
    async with started(monkeypatch) as held:
        await held.until(1)
        assert not held.router.serving
        held.may_hear.set()
        await held.until(2)
        assert held.router.serving


async def test_one_that_is_not_there_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "FIRST_LOOK_S", 2 * PATIENCE_S)
    async with started(monkeypatch, is_there=False) as held:
        await held.until(1)
        assert not held.router.serving
        held.may_hear.set()
        await until(held.serves, True)


async def test_one_that_is_not_heard_of_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "FIRST_LOOK_S", 0.05)
    async with started(monkeypatch) as held:
        await until(held.serves, True)
        await held.until(1)


async def test_later_any_engine_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "FIRST_LOOK_S", PATIENCE_S)
    async with started(monkeypatch) as held:
        held.may_hear.set()
        await held.until(2)
        held.router.membership.add("127.0.0.1:1")
        assert held.router.serving
