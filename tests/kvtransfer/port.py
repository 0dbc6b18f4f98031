"""The verbs of the transfer service as tests call them, in this process or over gRPC to another one.

Both ends speak protobuf, so a test is written once. Every failure is a ServiceError with code and reason.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Protocol

import grpc.aio
from microserve.kvtransfer.v1 import kvtransfer_pb2_grpc
from prometheus_client import CollectorRegistry

from services.kvtransfer.config import KvTransferConfig
from services.kvtransfer.peer_client import PeerClient
from services.kvtransfer.service import KvTransfer
from services.kvtransfer.servicer import KvTransferServicer
from services.kvtransfer.transports.base import Peer
from services.rpc.channel import make_channel
from services.rpc.status import remote_errors

# Every wait in these tests is for an event; this only bounds a test that fails.
PATIENCE_S = 60.0


class Port(Protocol):
    """A way of calling the service."""

    async def call(self, method: str, request: Any) -> Any:
        """A unary call."""

    def stream(self, method: str, request: Any) -> AsyncGenerator[Any, None]:
        """A server stream; closing it cancels the call."""

    async def close(self) -> None:
        """Ends the port."""


# Services of this process that may meet, by endpoint.
_direct: dict[str, KvTransfer] = {}
_serial = itertools.count()


async def _ask(endpoint: str) -> Peer:
    service = _direct.get(endpoint)
    return service.info() if service is not None else await PeerClient(None).ask(endpoint)


class DirectPort:
    """The service in this process, without a wire."""

    def __init__(self, **options: Any) -> None:
        endpoint = f"direct-{next(_serial)}:1"
        self.registry = CollectorRegistry()
        self.service = KvTransfer(KvTransferConfig(**options), lambda: endpoint, _ask, self.registry)
        self._servicer = KvTransferServicer(self.service)
        _direct[endpoint] = self.service

    async def call(self, method: str, request: Any) -> Any:
        return await getattr(self._servicer, method)(request, None)

    async def stream(self, method: str, request: Any) -> AsyncGenerator[Any, None]:
        async with aclosing(getattr(self._servicer, method)(request, None)) as responses:
            async for response in responses:
                yield response

    async def close(self) -> None:
        """Again is no error."""
        if _direct.pop(self.service.info().endpoint, None) is not None:
            await self.service.close()


class GrpcPort:
    """The service in its own process."""

    def __init__(self, address: str) -> None:
        self.channel: grpc.aio.Channel = make_channel(address)
        self._stub = kvtransfer_pb2_grpc.KvTransferServiceStub(self.channel)

    async def call(self, method: str, request: Any) -> Any:
        with remote_errors():
            return await getattr(self._stub, method)(request, timeout=PATIENCE_S)

    async def stream(self, method: str, request: Any) -> AsyncGenerator[Any, None]:
        call = getattr(self._stub, method)(request)
        try:
            with remote_errors():
                async for response in call:
                    yield response
        finally:
            call.cancel()

    async def close(self) -> None:
        await self.channel.close()
