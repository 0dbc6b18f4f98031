"""The router as a process: what it prints, how it ends, and that it needs no torch."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from microserve.router.v1 import router_pb2_grpc

from services.router.programs.catalogue import FALLBACK
from services.rpc.channel import make_channel
from tests.fakes import FakeEngine
from tests.router.harness import PROMPT, complete, failing, model, request
from tests.router.raw_http import get
from tests.router.talk import Talk, tokens

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'gen'}"}

STUBBORN = """
import asyncio


async def policy(request, fleet):
    async for chunk in fleet.least_loaded(request).start_generate(request):
        yield type(chunk)(chunk.token_ids)
    while True:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            pass
"""

YIELDS = "    yield fleet.least_loaded(request).start_generate(request)\n"

pytestmark = pytest.mark.slow


@asynccontextmanager
async def router(
    *options: str, pass_fds: tuple[int, ...] = (), start: tuple[str, str] = ("-m", "services.router")
) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, *start, "--listen", "127.0.0.1:0", *options),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=ENVIRONMENT,
        cwd=ROOT,
        pass_fds=pass_fds,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def ready(process: asyncio.subprocess.Process) -> dict[str, str]:
    assert process.stdout is not None
    line = (await process.stdout.readline()).decode()
    assert line.startswith("READY ")
    announced: dict[str, str] = json.loads(line.removeprefix("READY "))
    return announced


async def health_is(watch: Any, wanted: int) -> None:
    while (await watch.read()).status != wanted:
        pass


async def serving(channel: grpc.aio.Channel) -> Any:
    """Waits until it serves; returns the stream that says what comes next."""
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
    await health_is(watch, health_pb2.HealthCheckResponse.SERVING)
    return watch


async def test_a_request_in_flight_outlives_sigterm() -> None:
    engine = FakeEngine(model(), "a")
    address = await engine.start()
    try:
        async with router("--engine", address, "--http-listen", "127.0.0.1:0") as process:
            announced = await ready(process)
            assert announced["service"] == "router"
            assert announced["metrics"].startswith("127.0.0.1:")
            async with make_channel(announced["address"]) as channel:
                stub = router_pb2_grpc.RouterServiceStub(channel)
                watch = await serving(channel)
                engine.gate.clear()
                asking = asyncio.create_task(complete(stub, request()))
                await engine.until(lambda: engine.sequences)
                assert await get(announced["metrics"], "/health") == (200, "SERVING\n")
                process.send_signal(signal.SIGTERM)
                await health_is(watch, health_pb2.HealthCheckResponse.NOT_SERVING)
                assert (await get(announced["metrics"], "/health"))[0] == 503
                engine.gate.set()
                assert list((await asking).token_ids) == model().generate(PROMPT, 8)
            assert await process.wait() == 0
        await engine.idle()
    finally:
        await engine.stop()


async def test_sessions_end_with_what_they_run_when_the_router_is_told_to_stop() -> None:
    engine = FakeEngine(model(), "a")
    address = await engine.start()
    try:
        async with router("--engine", address) as process:
            announced = await ready(process)
            async with make_channel(announced["address"]) as channel:
                await serving(channel)
                stub = router_pb2_grpc.RouterServiceStub(channel)
                engine.gate.clear()
                busy, idle = Talk(stub), Talk(stub)
                await idle.ask(1, policy="nope")
                assert await idle.error(1) == ("NOT_FOUND", "UNKNOWN_POLICY")
                await busy.ask(1)
                await engine.until(lambda: engine.sequences)
                process.send_signal(signal.SIGTERM)
                with failing("UNAVAILABLE", "DRAINING"):
                    await idle.next()
                await busy.ask(2)
                assert await busy.error(2) == ("UNAVAILABLE", "DRAINING")
                engine.gate.set()
                assert tokens(await busy.answer(1)) == model().generate(PROMPT, 8)
                with failing("UNAVAILABLE", "DRAINING"):
                    await busy.next()
            assert await process.wait() == 0
        await engine.idle()
    finally:
        await engine.stop()


async def test_a_program_that_never_ends_does_not_hold_up_the_end(tmp_path: Path) -> None:
    path = tmp_path / "stubborn.py"
    path.write_text(STUBBORN)
    engine = FakeEngine(model(), "a")
    address = await engine.start()
    try:
        async with router("--engine", address, "--policy", str(path), "--grace-s", "0") as process:
            announced = await ready(process)
            async with make_channel(announced["address"]) as channel:
                await serving(channel)
                call = router_pb2_grpc.RouterServiceStub(channel).Generate(request(max_tokens=1))
                await call.read()  # and now the program waits
                process.send_signal(signal.SIGTERM)
                with pytest.raises(grpc.aio.AioRpcError):
                    await call.read()
            assert await asyncio.wait_for(process.wait(), 60) == 0
    finally:
        await engine.stop()


async def test_what_a_program_prints_is_in_the_log_at_once_and_not_beside_the_ready_line(tmp_path: Path) -> None:
    path = tmp_path / "talkative.py"
    path.write_text("print('loading')\n\n\nasync def policy(request, fleet):\n    print('asked')\n" + YIELDS)
    engine = FakeEngine(model(), "a")
    address = await engine.start()
    try:
        async with router("--engine", address, "--policy", str(path)) as process:
            announced = await ready(process)
            assert process.stderr is not None
            async with make_channel(announced["address"]) as channel:
                await serving(channel)
                await complete(router_pb2_grpc.RouterServiceStub(channel), request())
                printed = [line async for line in until(process.stderr, b" msg=asked\n") if b"rpc.printed" in line]
            assert [line.rpartition(b" msg=")[2] for line in printed] == [b"loading\n", b"asked\n"]
    finally:
        await engine.stop()


async def until(stream: asyncio.StreamReader, last: bytes) -> AsyncIterator[bytes]:
    """Its lines up to that one."""
    async with asyncio.timeout(60):
        async for line in stream:
            yield line
            if line.endswith(last):
                return


async def test_the_launchers_death_stops_it() -> None:
    read_end, write_end = os.pipe()
    options = ["--engine", "127.0.0.1:1", "--lifeline-fd", str(read_end)]
    async with router(*options, pass_fds=(read_end,)) as process:
        os.close(read_end)
        await ready(process)
        os.close(write_end)
        assert await process.wait() == 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--engine", "127.0.0.1:1", "--policy", "nope"], "no policy named 'nope'"),
        (["--engine", "127.0.0.1:1", "--policy", "missing.py"], "cannot read missing.py"),
        (["--policy", FALLBACK], "no engine can join"),
        (["--engine", "127.0.0.1:1", "--engine-tls-ca", "/nowhere.pem"], "cannot read /nowhere.pem"),
    ],
)
async def test_what_it_cannot_start_with_is_one_line(options: list[str], sentence: str) -> None:
    async with router(*options) as process:
        _, errors = await process.communicate()
        assert process.returncode == 2
        assert sentence in errors.decode()
        assert errors.count(b"\n") == 1


async def test_it_imports_without_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import services.router.process"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, env=ENVIRONMENT, cwd=ROOT)
    assert await process.wait() == 0
