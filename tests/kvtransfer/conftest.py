"""A port to the service and engines on it.

All tests share one event loop: grpc.aio drops events when a call of an earlier test ends after its loop was closed.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.kvtransfer.engine import FakeEngine, Shape
from tests.kvtransfer.port import DirectPort, GrpcPort, Port
from tests.kvtransfer.process import EngineProcess, ServiceProcess

StartEngine = Callable[..., Awaitable[FakeEngine]]
StartProcess = Callable[..., EngineProcess]

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents and pytest_asyncio.is_async_test(item):
            item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)


@pytest.fixture(scope="session")
def service() -> Iterator[ServiceProcess]:
    """One service process for all tests that do not end it."""
    process = ServiceProcess("--pool-keep-s", "60")
    yield process
    process.terminate()
    code, errors = process.end()
    assert code == 0, errors
    assert "Traceback" not in errors, errors


@pytest_asyncio.fixture(params=["shm-direct", "shm-grpc"], loop_scope="session")
async def port(request: pytest.FixtureRequest) -> AsyncIterator[Port]:
    """Every transport, in this process and through a real service process."""
    _transport, _, way = request.param.partition("-")
    if way == "direct":
        port: Port = DirectPort()
    else:
        port = GrpcPort(request.getfixturevalue("service").address)
    yield port
    await port.close()


@pytest_asyncio.fixture(loop_scope="session")
async def start_engine(port: Port, request: pytest.FixtureRequest) -> AsyncIterator[StartEngine]:
    """`await start_engine("d", shape, seed=...)`: an engine with an attached pool; it dies with the test."""
    with contextlib.ExitStack() as stack:

        async def start(
            name: str, shape: Shape | None = None, *, seed: int | None = None, incarnation: bytes | None = None
        ) -> FakeEngine:
            # One service serves many tests: names must differ.
            engine = FakeEngine(port, f"{name}@{request.node.name}".replace(" ", "")[:128], shape)
            engine.incarnation = incarnation or engine.incarnation
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
