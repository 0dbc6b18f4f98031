"""Engines behind a name that resolves to other addresses as time passes."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Collection

import pytest
from microserve.router.v1 import router_pb2_grpc

from services.router.app import Router
from services.router.config import RouterConfig
from services.router.errors import FleetFull
from services.router.fleet.dns import follow_dns, resolve
from services.rpc.bind import split_address
from services.rpc.channel import make_channel
from services.rpc.virtual_loop import run
from tests.fakes import PATIENCE_S, FakeEngine
from tests.router.harness import FAST, PROMPT, complete, model, request


class Published:
    """What a membership was told, with the time."""

    def __init__(self) -> None:
        self.told: list[tuple[float, str, list[str]]] = []

    def publish(self, source: str, addresses: Collection[str]) -> None:
        if len(addresses) > 2:
            raise FleetFull("too many")
        self.told.append((asyncio.get_running_loop().time(), source, list(addresses)))


def test_a_name_is_asked_for_again_and_failures_change_nothing(caplog: pytest.LogCaptureFixture) -> None:
    answers = [["10.0.0.1"], ["10.0.0.1", "fd00::2"], OSError("no server"), None, ["1", "2", "3"], ["10.0.0.3"]]

    async def look_up(host: str, port: int) -> list[str]:
        assert (host, port) == ("engines", 50051)
        answer = answers.pop(0) if answers else ["10.0.0.3"]
        if answer is None:
            await asyncio.sleep(12)
            answer = ["10.0.0.4"]
        if isinstance(answer, OSError):
            raise answer
        return answer

    async def main() -> list[tuple[float, str, list[str]]]:
        published = Published()
        following = asyncio.create_task(follow_dns("engines:50051", published, 5.0, look_up))  # type: ignore[arg-type]
        await asyncio.sleep(38)
        following.cancel()
        return published.told

    assert run(main()) == [
        (0, "dns:engines:50051", ["10.0.0.1:50051"]),
        (5, "dns:engines:50051", ["10.0.0.1:50051", "[fd00::2]:50051"]),
        # After a failure. While a name server is slow it is not asked again: each question takes a thread.
        (27, "dns:engines:50051", ["10.0.0.4:50051"]),
        (37, "dns:engines:50051", ["10.0.0.3:50051"]),  # after too many
    ]
    assert caplog.text.count("name not resolved") == 2


async def test_a_name_that_is_none_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    published, looks, several = Published(), itertools.count(1), asyncio.Event()

    async def look_up(host: str, port: int) -> list[str]:
        if next(looks) > 3:
            several.set()
        return await resolve(host, port)

    following = asyncio.create_task(follow_dns("a..b:1", published, 0.01, look_up))  # type: ignore[arg-type]
    async with asyncio.timeout(PATIENCE_S):
        await several.wait()
    assert not following.done()
    following.cancel()
    assert caplog.text.count("name not resolved") == 1


async def test_a_real_name_resolves() -> None:
    assert "127.0.0.1" in await resolve("localhost", 1)


async def test_a_router_serves_with_engines_behind_a_name() -> None:
    engine = FakeEngine(model(), "a")
    port = split_address(await engine.start())[1]
    router = Router(RouterConfig(listen="127.0.0.1:0", engine_dns=(f"localhost:{port}",)), backoff=FAST)
    changed = asyncio.Event()
    router.registry.on_change(changed.set)
    channel = None
    try:
        channel = make_channel((await router.start()).grpc)
        async with asyncio.timeout(PATIENCE_S):
            while not router.serving:
                await changed.wait()
                changed.clear()
        answer = await complete(router_pb2_grpc.RouterServiceStub(channel), request())
        assert list(answer.token_ids) == model().generate(PROMPT, 8)
        assert router.membership.sources(engine.address) == (f"dns:localhost:{port}",)
    finally:
        if channel is not None:
            await channel.close()
        await router.close()
        await engine.stop()
