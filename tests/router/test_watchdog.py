"""Programs that do not give the event loop back: interrupted, and the router goes on; else its process ends."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest
from microserve.router.v1 import router_pb2_grpc

from services.router.config import RouterConfig
from services.router.fleet.view import Fleet
from services.router.metrics import BLOCKED_LOOPS
from services.router.programs.watchdog import WatchdogLimits
from services.rpc.channel import make_channel
from tests.fakes import FakeEngine
from tests.router.harness import PROMPT, complete, failing, model, request, running
from tests.router.programs import write
from tests.router.test_process import ready, router, serving

BLOCKING = {
    "spins": "    while True:\n        pass\n    yield",
    "sleeps": "    import time\n    time.sleep(1000)\n    yield",
    "tries_again": (
        "    while True:\n        try:\n            while True:\n                pass\n"
        "        except Exception:\n            pass\n    yield"
    ),
    "spins_in_a_task": (
        "    async def spin():\n        while True:\n            pass\n"
        "    async with asyncio.TaskGroup() as group:\n        group.create_task(spin())\n    yield"
    ),
    "spins_holding_kv": (
        "    prefill, decode = fleet.pair(request)\n    async with decode.prep_recv(request, end=20):\n"
        "        while True:\n            pass\n    yield"
    ),
    "spins_after_first": (
        "    async for chunk in fleet.least_loaded(request).start_generate(request):\n        yield chunk\n"
        "        while True:\n            pass"
    ),
}
SHORT = WatchdogLimits(block_s=1.0)  # far longer than a busy machine holds up a program that blocks nothing

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", BLOCKING)
async def test_a_program_that_blocks_the_loop_is_interrupted(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RouterConfig, "watchdog_limits", SHORT)
    counter = BLOCKED_LOOPS.labels(name)
    before = counter._value.get()
    async with running(policy=str(write(tmp_path, name, BLOCKING[name]))) as suite:
        with failing("ABORTED", "POLICY_FAILED") as caught:
            await suite.generate(max_tokens=100)
        assert "blocked the router" in caught.value.message
        assert counter._value.get() > before
        await suite.idle()
        assert list((await suite.generate(policy="data_parallel")).token_ids) == model().generate(PROMPT, 8)


async def test_requests_beside_it_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RouterConfig, "watchdog_limits", SHORT)
    path = write(tmp_path, "spins", BLOCKING["spins"])
    async with running(policy_file=(path,)) as suite:
        good = [asyncio.create_task(suite.generate()) for _ in range(8)]
        with failing("ABORTED", "POLICY_FAILED"):
            await suite.generate(policy="spins")
        for answer in await asyncio.gather(*good):
            assert list(answer.token_ids) == model().generate(PROMPT, 8)


CALLS_ROUTER = """
    fleet.spin(0.8)
    while True:
        pass
    yield
"""
ROUTER_CODE = """
def spin(fleet, seconds):
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            pass
        whole.append(True)
    except BaseException:
        whole.append(False)
        raise
"""


async def test_code_of_the_router_that_a_program_calls_is_not_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RouterConfig, "watchdog_limits", SHORT)
    whole: list[bool] = []
    module = {"__name__": "services.router.fleet.slow", "time": time, "whole": whole}
    exec(ROUTER_CODE, module)
    monkeypatch.setattr(Fleet, "spin", module["spin"], raising=False)
    async with running(policy=str(write(tmp_path, "calls_router", CALLS_ROUTER))) as suite:
        with failing("ABORTED", "POLICY_FAILED") as caught:
            await suite.generate()
        assert "blocked the router" in caught.value.message
        assert whole == [True]


async def test_a_slow_router_is_reported_and_not_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RouterConfig, "watchdog_limits", SHORT)
    counter = BLOCKED_LOOPS.labels("router")
    before = counter._value.get()
    async with running() as suite:
        while counter._value.get() == before:
            pass  # the loop stands still, and no program is to blame
        assert list((await suite.generate()).token_ids) == model().generate(PROMPT, 8)


STUBBORN = """
    while True:
        try:
            while True:
                pass
        except BaseException:
            pass
    yield
"""


NATIVE = """
    sum(range(10**14))
    yield
"""


@pytest.mark.parametrize(
    ("name", "body", "code", "said"),
    [
        ("stubborn", STUBBORN, os.EX_SOFTWARE, b"policy=stubborn"),
        ("native", NATIVE, -signal.SIGPROF, b'native.py", line 7 in policy'),  # it lets no thread run
    ],
)
async def test_a_program_that_cannot_be_interrupted_ends_the_process(
    tmp_path: Path, name: str, body: str, code: int, said: bytes
) -> None:
    path = write(tmp_path, name, body)
    engine = FakeEngine(model(), "a")
    address = await engine.start()
    launcher = (
        "import services.router.config as config, services.router.process as main\n"
        "config.GIVE_UP_TIMEOUT_S = 4.0\nmain.main()\n"
    )
    options = ("--engine", address, "--policy", str(path), "--policy-block-timeout", "0.2")
    try:
        async with router(*options, start=("-c", launcher)) as process:
            announced = await ready(process)
            async with make_channel(announced["address"]) as channel:
                await serving(channel)
                with failing("UNAVAILABLE", "UNAVAILABLE"):
                    await complete(router_pb2_grpc.RouterServiceStub(channel), request())
            assert await asyncio.wait_for(process.wait(), 240) == code
            assert process.stderr is not None
            assert said in await process.stderr.read()
        await engine.idle()
    finally:
        await engine.stop()
