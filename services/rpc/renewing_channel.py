"""A client channel whose certificates may be replaced while it is in use."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self
from weakref import WeakSet

import grpc
import grpc.aio

from services.rpc.reloaded import Reloaded

# Calls that were begun before a replacement may go on for as long as they like: streams have no end.
_LONGEST_CALL_S = 1e9


class RenewingChannel(grpc.aio.Channel):
    """A call goes over a channel with the latest certificates, and stays there.

    grpc's own credentials are for good. With them a server that asks for a certificate could not be reached again once
    that of the start has expired.
    """

    def __init__(
        self,
        credentials: Reloaded[grpc.ChannelCredentials],
        connect: Callable[[grpc.ChannelCredentials], grpc.aio.Channel],
    ) -> None:
        self._credentials = credentials
        self._connect = connect
        self._used = credentials.latest()
        self._channel = connect(self._used)
        self._before: set[asyncio.Task[None]] = set()  # channels that end with their calls
        self._calls: WeakSet[Any] = WeakSet()

    def latest(self) -> grpc.aio.Channel:
        """Where a call that begins now belongs."""
        credentials = self._credentials.latest()
        if credentials is not self._used:
            ending = asyncio.create_task(self._channel.close(_LONGEST_CALL_S), name="close after its calls")
            self._before.add(ending)
            ending.add_done_callback(self._before.discard)
            self._used, self._channel = credentials, self._connect(credentials)
        return self._channel

    def begun(self, call: Any) -> None:
        """A call that close() has to end."""
        self._calls.add(call)

    async def close(self, grace: float | None = None) -> None:
        """See grpc.aio.Channel."""
        before = tuple(self._before)
        ends = [asyncio.wait(before, timeout=grace)] if before and grace else []
        await asyncio.gather(self._channel.close(grace), *ends)
        # Of a channel that is closing a second close does nothing, whatever its grace.
        for call in tuple(self._calls):
            call.cancel()
        await asyncio.gather(*before)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """See grpc.aio.Channel."""
        return self.latest().get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """See grpc.aio.Channel."""
        await self.latest().wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """See grpc.aio.Channel."""
        await self.latest().channel_ready()

    def unary_unary(self, *how: Any, **more: Any) -> Any:
        """See grpc.aio.Channel."""
        return _Method(self, lambda channel: channel.unary_unary(*how, **more))

    def unary_stream(self, *how: Any, **more: Any) -> Any:
        """See grpc.aio.Channel."""
        return _Method(self, lambda channel: channel.unary_stream(*how, **more))

    def stream_unary(self, *how: Any, **more: Any) -> Any:
        """See grpc.aio.Channel."""
        return _Method(self, lambda channel: channel.stream_unary(*how, **more))

    def stream_stream(self, *how: Any, **more: Any) -> Any:
        """See grpc.aio.Channel."""
        return _Method(self, lambda channel: channel.stream_stream(*how, **more))


class _Method:
    """A method of a stub, over whichever channel is the latest."""

    def __init__(self, channel: RenewingChannel, bind: Callable[[grpc.aio.Channel], Any]) -> None:
        self._channel = channel
        self._bind = bind
        self._bound_to: grpc.aio.Channel | None = None
        self._bound: Any = None

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        latest = self._channel.latest()
        if latest is not self._bound_to:
            self._bound_to, self._bound = latest, self._bind(latest)
        call = self._bound(*arguments, **named)
        self._channel.begun(call)
        return call
