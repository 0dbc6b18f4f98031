"""A port to the service and engines on it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest

from tests.kvtransfer.engine import FakeEngine, Shape
from tests.kvtransfer.port import DirectPort, GrpcPort, Port
from tests.kvtransfer.process import EngineProcess, ServiceProcess

StartEngine = Callable[..., Awaitable[FakeEngine]]
StartProcess = Callable[..., EngineProcess]


@pytest.fixture(scope="session")
def service() -> Iterator[ServiceProcess]:
    """One service process for all tests that do not end it."""
    process = ServiceProcess("--pool-keep-s", "60")
    yield process
    process.terminate()
    code, errors = process.end()
    assert code == 0, errors
    assert "Traceback" not in errors, errors


@pytest.fixture(params=["shm-direct", "shm-grpc"])
async def port(request: pytest.FixtureRequest) -> AsyncIterator[Port]:
    """Every transport, in this process and through a real service process."""
    _transport, _, way = request.param.partition("-")
    if way == "direct":
        port: Port = DirectPort()
    else:
        port = GrpcPort(request.getfixturevalue("service").address)
    yield port
    await port.close()


@pytest.fixture
async def start_engine(port: Port, request: pytest.FixtureRequest) -> AsyncIterator[StartEngine]:
    """`await start_engine("d", shape, seed=...)`: an engine with an attached pool; it dies with the test."""
    with contextlib.ExitStack() as stack:

        async def start(name: str, shape: Shape | None = None, *, seed: int | None = None) -> FakeEngine:
            # One service serves many tests: names must differ.
            engine = FakeEngine(port, f"{name}@{request.node.name}".replace(" ", "")[:128], shape)
            stack.callback(engine.close)
            return await engine.start(seed=seed)

        yield start


@pytest.fixture
def start_process() -> Iterator[StartProcess]:
    """`start_process(invitation, seed)`: an engine in a process of its own; killed after the test."""
    with contextlib.ExitStack() as stack:

        def start(socket_path: str, ticket: bytes, seed: int) -> EngineProcess:
            process = EngineProcess(socket_path, ticket, seed)
            stack.callback(process.kill)
            return process

        yield start
