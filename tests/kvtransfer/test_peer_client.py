"""What a transfer service learns of another one over gRPC."""

from __future__ import annotations

from typing import Any

import grpc.aio
import pytest
from microserve.kvtransfer.v1 import kvtransfer_pb2 as pb
from microserve.kvtransfer.v1 import kvtransfer_pb2_grpc as pb_grpc

from services.kvtransfer.errors import NoTransport, PeerUnreachable
from services.kvtransfer.peer_client import PeerClient
from services.kvtransfer.transports.base import PEER_VERSION


class Newer(pb_grpc.KvTransferServiceServicer):
    async def GetInfo(
        self, request: pb.GetInfoRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetInfoResponse:
        return pb.GetInfoResponse(peer_version=PEER_VERSION + 1, epoch=b"e" * 16)


async def test_a_service_of_another_version_is_no_way_to_move_kv() -> None:
    """Not UNAVAILABLE: routers would repeat the call, and hold it against the sender's engine."""
    server = grpc.aio.server()
    pb_grpc.add_KvTransferServiceServicer_to_server(Newer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        with pytest.raises(NoTransport, match=f"speaks version {PEER_VERSION + 1}, this one {PEER_VERSION}"):
            await PeerClient(None).ask(f"127.0.0.1:{port}")
    finally:
        await server.stop(None)


async def test_what_is_no_address_is_out_of_reach() -> None:
    with pytest.raises(PeerUnreachable, match="receiver's transfer service"):
        await PeerClient(None).ask("nowhere")
