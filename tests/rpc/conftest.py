"""A real server on a free port and a real client, for servicers made up by each test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import grpc.aio
import pytest
from microserve.engine.v1 import engine_pb2_grpc

from services.rpc.channel import make_channel
from services.rpc.server import Server, ServerConfig
from services.rpc.tls import ClientTls

SERVICE = "microserve.engine.v1.EngineService"


@dataclass(frozen=True, slots=True)
class Running:
    """A started server with a client of it."""

    server: Server
    channel: grpc.aio.Channel
    stub: Any


Serve = Callable[..., Awaitable[Running]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """`await serve(servicer, tls=..., **ServerConfig fields)`; everything is stopped after the test."""
    async with AsyncExitStack() as stack:

        async def start(
            servicer: engine_pb2_grpc.EngineServiceServicer | None = None,
            *,
            tls: ClientTls | None = None,
            **fields: Any,
        ) -> Running:
            server = Server(ServerConfig(**{"metrics_port": None, **fields}), "engine")
            servicer = servicer or engine_pb2_grpc.EngineServiceServicer()
            engine_pb2_grpc.add_EngineServiceServicer_to_server(servicer, server.grpc)
            bound = await server.start()
            stack.push_async_callback(server.stop, 0)
            channel = make_channel(bound, tls)
            stack.push_async_callback(channel.close)
            return Running(server, channel, engine_pb2_grpc.EngineServiceStub(channel))

        yield start
