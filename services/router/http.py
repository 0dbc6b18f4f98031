"""An HTTP/1.1 server in the router's own loop, around any ASGI application."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable
from typing import Any

import httptools
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from services.rpc.bind import join_address, split_address
from services.rpc.errors import port_in_use
from services.rpc.tls import ServerTls

_HEAD_TIMEOUT_S = 10.0
_REST_TIMEOUT_S = 10.0
# Also of what is neither head nor body: lines of chunks, trailers.
_MAX_HEAD_BYTES = 1 << 16
_MAX_PIPELINED = 8
_KEEP_ALIVE_S = 75
_BACKLOG = 2048
# What asyncio calls the backlog is also how often it tries again at once, and logs, when there is no descriptor left.
_ACCEPTED_AT_ONCE = 1
_CLOSE_S = 5.0
# In the `state` of a scope: the Client that asks.
CLIENT = "microserve.client"


class ClientGone(Exception):
    """Nobody is there any more who could be answered."""


class Client:
    """The other end of a connection. ASGI itself tells that a client leaves only to who waits for that, which takes a
    task for every request, that the connection has room only to who waits for that, which takes a turn, and that a
    body is all here only to who waits for that, which takes a timer."""

    def __init__(self) -> None:
        self.has_room = True  # what is sent is written at once
        self.has_spoken = False  # what it has begun to ask for is here with all of its body
        self._has_left = False
        self._asking: asyncio.Task[Any] | None = None

    async def stays_for(self, work: Awaitable[object]) -> None:
        """Does the work; cancels it when the client leaves. ClientGone."""
        self._asking = asyncio.current_task()
        if self._has_left:
            self.leave()
        try:
            await work
        except asyncio.CancelledError:
            if not self._has_left:
                raise
            raise ClientGone from None
        finally:
            self._asking = None

    def leave(self) -> None:
        """For the connection to say."""
        self._has_left = True
        if self._asking is not None:
            self._asking.cancel()


class HttpServer:
    """Serves an application from start() until close()."""

    def __init__(
        self, app: ASGIApp, *, client_timeout_s: float, shared: bool = False, tls: ServerTls | None = None
    ) -> None:
        """A connection that takes nothing for `client_timeout_s` ends. `shared`: SO_REUSEPORT is on."""
        self._client_timeout_s = client_timeout_s
        self._shared = shared
        self._tls = tls
        # What fails inside the application is the application's to log.
        options: dict[str, Any] = {"log_config": None, "log_level": "critical", "access_log": False}
        self._config = uvicorn.Config(
            app, ws="none", lifespan="off", proxy_headers=False, timeout_keep_alive=_KEEP_ALIVE_S, **options
        )
        self._state = ServerState()
        self._server: asyncio.Server | None = None

    async def start(self, listen: str) -> str:
        """Binds host:port and returns what was bound. PortInUse, StartError."""
        context = self._tls.context() if self._tls is not None else None
        self._config.load()
        listener = self._bind(listen)
        self._server = await asyncio.get_running_loop().create_server(
            lambda: _Protocol(self._config, self._state), sock=listener, ssl=context, backlog=_ACCEPTED_AT_ONCE
        )
        listener.listen(_BACKLOG)
        return join_address(split_address(listen)[0], listener.getsockname()[1])

    async def close(self) -> None:
        """Frees the port and cuts off what is under way. Idempotent; bounded."""
        if self._server is None:
            return
        self._server.close()
        tasks = tuple(self._state.tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_CLOSE_S)
        for connection in tuple(self._state.connections):
            connection.transport.abort()
        await self._server.wait_closed()
        self._server = None

    def _bind(self, listen: str) -> socket.socket:
        host, port = split_address(listen)
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            listener = socket.socket(family, kind, protocol)
        except OSError as error:
            raise port_in_use(listen, error) from None
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if self._shared:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            # Accepted connections inherit it: what a client does not take in time, the kernel gives up.
            timeout_ms = max(1, round(self._client_timeout_s * 1000))
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout_ms)
            listener.bind(address)
        except (OSError, OverflowError) as error:
            listener.close()
            raise port_in_use(listen, error) from None
        return listener


class _TooMany(Exception):
    """Stops the parser."""


class _Protocol(HttpToolsProtocol):
    """Uvicorn's connection takes any head of a request, any trailers and any number of requests at once, and waits for
    a head for ever, as for what is left of a body that was answered before its end; this one does not. Nor does it take
    the body of a request that offers to upgrade for a request: it declines the offer, as HTTP lets a server do."""

    def __init__(self, config: uvicorn.Config, state: ServerState) -> None:
        self._client = Client()
        self._head_timer: asyncio.TimerHandle | None = None
        self._rest_timer: asyncio.TimerHandle | None = None
        self._is_head = True  # what comes next
        self._is_head_again = False
        # Both at most: what was parsed since a message began or had a body, and what is left of a piece.
        self._num_bodiless_bytes = 0
        self._num_piece_bytes = 0
        super().__init__(config, state, {CLIENT: self._client})

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        self._end_rest()
        super().connection_lost(exc)
        self._client.leave()

    def data_received(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest and not self.transport.is_closing():
            piece, rest = rest[:_MAX_HEAD_BYTES], rest[_MAX_HEAD_BYTES:]
            self._take(piece)

    def pause_writing(self) -> None:
        self._client.has_room = False
        super().pause_writing()

    def resume_writing(self) -> None:
        self._client.has_room = True
        super().resume_writing()

    def on_message_begin(self) -> None:
        if self._is_head_again:
            return
        self._end_head()
        self._unset_keepalive_if_required()
        self._is_head, self._num_bodiless_bytes = True, self._num_piece_bytes
        self._client.has_spoken = False
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        if self._is_head_again:
            return
        self._end_head()
        self._is_head = False
        super().on_headers_complete()
        self.headers = []  # trailers are nobody's
        if len(self.pipeline) > _MAX_PIPELINED:
            self.transport.abort()
            raise _TooMany

    def on_body(self, body: bytes) -> None:
        self._num_piece_bytes -= len(body)
        self._num_bodiless_bytes = self._num_piece_bytes
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # the body comes after it
        self._end_rest()
        self._client.has_spoken = True
        super().on_message_complete()

    def on_response_complete(self) -> None:
        # A request that others wait behind is here with all of its body.
        if not self.pipeline and self.cycle.more_body and not self.transport.is_closing():
            self._rest_timer = self.loop.call_later(_REST_TIMEOUT_S, self.transport.abort)
        super().on_response_complete()

    def _take(self, piece: memoryview) -> None:
        self._num_piece_bytes = len(piece)
        self._num_bodiless_bytes += len(piece)
        try:
            self._parse(piece)
        except httptools.HttpParserError:
            if not self.transport.is_closing():
                self.send_400_response("Invalid HTTP request received.")
            return
        if self._num_bodiless_bytes > _MAX_HEAD_BYTES:
            self.transport.abort()
        elif self._is_head and self._head_timer is None:  # most heads come in one piece
            self._wait_for_head()

    def _parse(self, piece: memoryview) -> None:
        while piece:
            try:
                self.parser.feed_data(piece)
                return
            except httptools.HttpParserUpgrade as upgrade:
                piece = piece[upgrade.args[0] :]
                self._parse_head_again()

    def _parse_head_again(self) -> None:
        """A parser takes no body after a head that offers to upgrade, nor anything if that head also ends the
        connection; another one does after a head that says only where body and connection end."""
        ends = [item for item in self.scope["headers"] if item[0] in (b"content-length", b"transfer-encoding")]
        if not self.cycle.keep_alive:
            ends.append((b"connection", b"close"))
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._is_head_again = True
        self.parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n" % b"".join(b"%b: %b\r\n" % item for item in ends))
        self._is_head_again = False

    def _wait_for_head(self) -> None:
        self._head_timer = self.loop.call_later(_HEAD_TIMEOUT_S, self.transport.abort)

    def _end_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _end_rest(self) -> None:
        if self._rest_timer is not None:
            self._rest_timer.cancel()
            self._rest_timer = None
