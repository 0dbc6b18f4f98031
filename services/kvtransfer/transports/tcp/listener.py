"""The data port: where other services connect to write."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from functools import partial

from services.kvtransfer.errors import PeerLost, TooManyConnections, TransportFailed
from services.kvtransfer.transports.tcp.channel import Channel
from services.kvtransfer.transports.tcp.heartbeat import SILENCE_LIMIT_S
from services.kvtransfer.transports.tcp.inbound import Inbound, Reception
from services.kvtransfer.transports.tcp.wire import encode_error
from services.protocol.errors import ServiceError
from services.rpc.bind import join_address, split_address
from services.rpc.errors import port_in_use

log = logging.getLogger(__name__)

_BACKLOG = 64
_PAUSE_S = 0.2


class Listener:
    """Takes connections, at most `most`; each is served by a thread of its own."""

    def __init__(self, listen: str, reception: Reception, tls: ssl.SSLContext | None, most: int) -> None:
        """Raises PortInUse or StartError."""
        self._reception = reception
        self._tls = tls
        self._most = most
        self._connections: set[Inbound] = set()
        self._loop = asyncio.get_running_loop()
        host, port = split_address(listen)
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            self._socket = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        except OSError as error:
            raise port_in_use(listen, error) from None
        self._socket.setblocking(False)
        self.bound = join_address(*self._socket.getsockname()[:2])
        self._loop.add_reader(self._socket, self._incoming)

    async def close(self) -> None:
        """Stops listening and ends all connections. Again is no error."""
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket)
            self._socket.close()
        connections = tuple(self._connections)
        for connection in connections:
            connection.cut()
        for connection in connections:
            await asyncio.to_thread(connection.join)

    def _incoming(self) -> None:
        try:
            accepted, address = self._socket.accept()
        except BlockingIOError:
            return
        except OSError as error:
            # Out of descriptors: without a pause this would be called at once again.
            log.warning("cannot accept", extra={"fields": {"why": str(error)}})
            self._loop.remove_reader(self._socket)
            self._loop.call_later(_PAUSE_S, self._resume)
            return
        name = join_address(*address[:2])
        try:
            if len(self._connections) >= self._most:
                self._make_room()
            connection = Inbound(f"kv-in {name}", self._reception, partial(self._channel, accepted), self._ended)
            connection.start()
        except (TooManyConnections, TransportFailed) as error:
            self._turn_away(accepted, name, error)
            return
        self._connections.add(connection)

    def _resume(self) -> None:
        if self._socket.fileno() >= 0:
            self._loop.add_reader(self._socket, self._incoming)

    def _make_room(self) -> None:
        """Cuts the connection that was used longest ago of those that nothing lives on; its peer connects again when it
        has something to send. Raises TooManyConnections if there is none.

        Strangers go by themselves in time. Their threads may be in a handshake, which cannot be cut.
        """
        needed = self._reception.needed()
        spare = {c: c.used_s for c in self._connections if c.used_s is not None and c not in needed}
        if not spare:
            raise TooManyConnections(f"the data port takes {self._most} connections")
        oldest = min(spare, key=spare.__getitem__)
        oldest.cut()
        self._connections.discard(oldest)

    def _ended(self, connection: Inbound) -> None:
        self._connections.discard(connection)

    def _turn_away(self, accepted: socket.socket, name: str, error: ServiceError) -> None:
        log.warning("connection refused", extra={"fields": {"connection": name, "why": error.message}})
        with accepted, contextlib.suppress(OSError):
            accepted.setblocking(False)
            if self._tls is None:
                accepted.send(encode_error(0, error))

    def _channel(self, accepted: socket.socket) -> Channel:
        """On the connection's thread, because a handshake takes the time that the other side takes."""
        if self._tls is None:
            return Channel(accepted)
        accepted.settimeout(SILENCE_LIMIT_S)
        try:
            return Channel(self._tls.wrap_socket(accepted, server_side=True))
        except OSError as error:
            accepted.close()
            raise PeerLost(f"no TLS: {error}") from None
