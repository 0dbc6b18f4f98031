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
from tests.kvtransfer.nixl.installed import needs_nixl
from tests.kvtransfer.port import DirectPort, GrpcPort, Port
from tests.kvtransfer.process import EngineProcess, ServiceProcess

StartEngine = Callable[..., Awaitable[FakeEngine]]
StartProcess = Callable[..., EngineProcess]

HERE = Path(__file__).parent
# Services that have NIXL and nothing else to each other: the probe would choose between it and tcp.
NIXL = ("--nixl-devices", "lo", "--data-listen", "none")
# Fixtures of the senders' and the receivers' service, by transport.
_NAMES = {
    "shm": ("service", "service"),
    "tcp": ("service", "far_service"),
    "nixl": ("nixl_service", "far_nixl_service"),
    "nixl and tcp": ("both_service", "far_both_service"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents and pytest_asyncio.is_async_test(item):
            item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)


@pytest.fixture(scope="session")
def service() -> Iterator[ServiceProcess]:
    """One service process for all tests that do not end it."""
    yield from _run("--pool-keep-s", "60")


def _run(*argv: str) -> Iterator[ServiceProcess]:
    process = ServiceProcess(*argv)
    yield process
    process.terminate()
    code, errors = process.end()
    assert code == 0, errors
    assert "Traceback" not in errors, errors


@pytest.fixture(scope="session")
def nixl_service() -> Iterator[ServiceProcess]:
    """A service process with NIXL."""
    yield from _run("--pool-keep-s", "60", *NIXL)


@pytest.fixture(scope="session")
def far_nixl_service() -> Iterator[ServiceProcess]:
    """The service process with NIXL of another node."""
    yield from _run("--pool-keep-s", "60", *NIXL)


@pytest.fixture(scope="session")
def both_service() -> Iterator[ServiceProcess]:
    """A service process with NIXL and tcp."""
    yield from _run("--pool-keep-s", "60", *NIXL[:2])


@pytest.fixture(scope="session")
def far_both_service() -> Iterator[ServiceProcess]:
    """The service process with NIXL and tcp of another node."""
    yield from _run("--pool-keep-s", "60", *NIXL[:2])


@pytest.fixture(scope="session")
def far_service() -> Iterator[ServiceProcess]:
    """The service process of another node."""
    yield from _run("--pool-keep-s", "60")


WAYS = ("shm-direct", "shm-grpc", "tcp-direct", "tcp-grpc")


@pytest.fixture(params=[*WAYS, pytest.param("nixl-grpc", marks=needs_nixl)])
def way(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(transport, how the service is called): every transport, in this process and through real service processes."""
    transport, _, how = request.param.partition("-")
    return transport, how


@pytest.fixture
def transport(way: tuple[str, str]) -> str:
    """The transport under test."""
    return way[0]


@pytest_asyncio.fixture(loop_scope="session")
async def port(way: tuple[str, str], request: pytest.FixtureRequest) -> AsyncIterator[Port]:
    """The senders' service."""
    port = DirectPort() if way[1] == "direct" else GrpcPort(request.getfixturevalue(_NAMES[way[0]][0]).address)
    yield port
    await port.close()


@pytest_asyncio.fixture(loop_scope="session")
async def far_port(way: tuple[str, str], port: Port, request: pytest.FixtureRequest) -> AsyncIterator[Port]:
    """The receivers' service: the senders' own, or one that is reached over the network."""
    if way[0] == "shm":
        yield port
        return
    far = DirectPort() if way[1] == "direct" else GrpcPort(request.getfixturevalue(_NAMES[way[0]][1]).address)
    yield far
    await far.close()


@pytest_asyncio.fixture(loop_scope="session")
async def start_engine(port: Port, far_port: Port, request: pytest.FixtureRequest) -> AsyncIterator[StartEngine]:
    """`await start_engine("d", shape, seed=...)`: an engine with an attached pool; it dies with the test. Those whose
    names begin with d or e live at the receivers' service."""
    with contextlib.ExitStack() as stack:

        async def start(
            name: str, shape: Shape | None = None, *, seed: int | None = None, incarnation: bytes | None = None
        ) -> FakeEngine:
            at = far_port if name[0] in "de" else port
            # One service serves many tests: names must differ.
            engine = FakeEngine(at, f"{name}@{request.node.name}".replace(" ", "")[:128], shape)
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
