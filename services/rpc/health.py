"""grpc.health.v1 whose watchers do not hold up a shutdown."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2

# Of a service. Nobody shows a key to watch, and what he names is kept for as long as he does.
_LONGEST_NAME = 256
_FINAL = (health_pb2.HealthCheckResponse.NOT_SERVING, health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)


class _Told:
    """A watcher's stream that knows whether the last status it was told can be the last of all."""

    def __init__(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self._context = context
        self.final = asyncio.Event()

    async def write(self, reply: health_pb2.HealthCheckResponse) -> None:
        """Sends a status."""
        await self._context.write(reply)
        if reply.status in _FINAL:
            self.final.set()
        else:
            self.final.clear()


class HealthService(health.aio.HealthServicer):
    """The library's servicer, with an end to Watch: a server that stops waits for its calls, and Watch has no end."""

    def __init__(self) -> None:
        super().__init__()
        self._ending = asyncio.Event()

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """See the contract; ends with OK after end_watches, when NOT_SERVING has been sent."""
        if len(request.service) > _LONGEST_NAME:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no service has so long a name")
        told = _Told(context)
        watch = asyncio.ensure_future(super().Watch(request, cast("grpc.aio.ServicerContext[Any, Any]", told)))
        ending = asyncio.ensure_future(self._end_of(told))
        try:
            await asyncio.wait({watch, ending}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ending.cancel()
            watch.cancel()
            await asyncio.gather(watch, ending, return_exceptions=True)

    async def end_watches(self) -> None:
        """NOT_SERVING for good: tells all watchers, then ends their streams."""
        await self.enter_graceful_shutdown()
        self._ending.set()

    async def _end_of(self, told: _Told) -> None:
        await self._ending.wait()
        # Not before: a write that is under way must not be cut off.
        await told.final.wait()
