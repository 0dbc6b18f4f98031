"""Pings find a peer that is gone, and never cost a connection that is well."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.rpc import channel as channels
from services.rpc.server import Server
from services.rpc.server_config import ServerConfig

INTERVAL_MS = 1_000  # grpc pings no faster
PERMIT = "grpc.keepalive_permit_without_calls"


@pytest.mark.slow
async def test_an_idle_channel_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours, which does not ping while idle, and beside it one of somebody whose does. Five pings' time."""
    monkeypatch.setattr(channels, "KEEPALIVE_INTERVAL_MS", INTERVAL_MS)
    server = Server(ServerConfig(listen="127.0.0.1:0"), "test")
    address = await server.start()
    ours = [option for option in channels.keepalive_options() if option[0] != PERMIT]
    assert (PERMIT, 0) in channels.keepalive_options()
    try:
        await asyncio.gather(*(stays(address, [*ours, (PERMIT, idle_pings)]) for idle_pings in (0, 1)))
    finally:
        await server.stop(0)


async def stays(address: str, options: list[tuple[str, int]]) -> None:
    """AssertionError if a channel with these options does not."""
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5 * INTERVAL_MS / 1000):
                await channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
