"""Joining routers by itself: the engine tells each of them that it is there, again and again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import grpc.aio
from microserve.router.v1 import registration_pb2, registration_pb2_grpc

from services.protocol.errors import ServiceError
from services.rpc.channel import make_channel
from services.rpc.log import log_failure
from services.rpc.status import remote_errors
from services.rpc.tls import ClientTls

log = logging.getLogger(__name__)

_CALL_TIMEOUT_S = 2.0
_AGAIN_S = 1.0  # after a router did not answer
_SHORTEST_S = 0.05


class Registrar:
    """Keeps an engine registered at every router from start() to leave()."""

    def __init__(self, routers: Sequence[str], token: str | None, tls: ClientTls | None) -> None:
        self._routers = tuple(routers)
        self._metadata = (("authorization", f"Bearer {token}"),) if token is not None else ()
        self._tls = tls
        self._address = ""
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, address: str) -> None:
        """Begins to register `address`, at which routers reach this engine."""
        self._address = address
        self._tasks = [
            asyncio.create_task(self._stay(router), name=f"register at {router}") for router in self._routers
        ]
        for task in self._tasks:
            task.add_done_callback(log_failure)

    async def leave(self) -> None:
        """Tells the routers that it leaves; waits for those that answer, bounded. Idempotent."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if tasks:
            await asyncio.gather(*map(self._deregister, self._routers))

    async def _stay(self, router: str) -> None:
        was_registered = None
        async with make_channel(router, self._tls) as channel:
            stub = registration_pb2_grpc.RegistrationServiceStub(channel)
            request = registration_pb2.RegisterRequest(address=self._address)
            while True:
                try:
                    with remote_errors():
                        reply = await stub.Register(request, timeout=_CALL_TIMEOUT_S, metadata=self._metadata)
                    # A third: two may be lost before the lease is.
                    wait_s, problem = max(_SHORTEST_S, reply.lease.ToNanoseconds() / 3e9), ""
                except ServiceError as error:
                    wait_s, problem = _AGAIN_S, f"{error.reason}: {error.message}"
                if was_registered is not (not problem):
                    was_registered = not problem
                    fields = {"router": router, "problem": problem}
                    log.log(logging.WARNING if problem else logging.INFO, "registration", extra={"fields": fields})
                await asyncio.sleep(wait_s)

    async def _deregister(self, router: str) -> None:
        async with make_channel(router, self._tls) as channel:
            stub = registration_pb2_grpc.RegistrationServiceStub(channel)
            request = registration_pb2.DeregisterRequest(address=self._address)
            try:
                await stub.Deregister(request, timeout=_CALL_TIMEOUT_S, metadata=self._metadata)
            except grpc.aio.AioRpcError as error:
                # The router hears of the end by health anyway.
                log.info("not deregistered", extra={"fields": {"router": router, "code": error.code().name}})
