"""Moves pages to pools of other transfer services over TCP."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from zlib import crc32

from microserve.kvtransfer.v1 import data_pb2 as pb

from services.kvtransfer.errors import PeerLost, TransportFailed
from services.kvtransfer.landing import Claim, Landings
from services.kvtransfer.pool import Pool
from services.kvtransfer.transports.base import Capabilities, Peer, PutRequest, Reach, Unsupported
from services.kvtransfer.transports.tcp.channel import Channel
from services.kvtransfer.transports.tcp.heartbeat import SILENCE_LIMIT_S
from services.kvtransfer.transports.tcp.inbound import Reception
from services.kvtransfer.transports.tcp.lane import ProbeSource, TcpLane
from services.kvtransfer.transports.tcp.listener import Listener
from services.kvtransfer.transports.tcp.outbound import Outbound
from services.kvtransfer.transports.tcp.statement import Statement, proved
from services.kvtransfer.transports.tcp.wire import MAX_PUT_BYTES
from services.protocol.address import KvAddress
from services.protocol.errors import LayoutMismatch, ServiceError
from services.protocol.grants import AlreadyCommitted
from services.protocol.ranges import TokenRange
from services.rpc.bind import advertised_address, split_address
from services.rpc.reloaded import Reloaded
from services.rpc.tls import ClientTls, ServerTls

# Each is sent only if the one before took less than this.
_PROBE_BYTES = (64 << 10, 1 << 20, 8 << 20)
_PROBE_S = 0.05


@dataclass(frozen=True, slots=True)
class TcpConfig:
    """How the data port is served and how those of others are reached."""

    listen: str
    advertise: str | None
    most_connections: int
    connections_per_peer: int
    max_frame_bytes: int
    checksums: bool
    tls: ServerTls | None = None
    peer_tls: ClientTls | None = None


class TcpTransport:
    """Belongs to the running loop. `endpoint` tells where the service itself is reached."""

    capabilities = Capabilities("tcp", Reach.NETWORK)

    def __init__(self, landings: Landings, epoch: bytes, endpoint: Callable[[], str], config: TcpConfig) -> None:
        """Listens. Raises PortInUse or StartError."""
        self._epoch = epoch
        self._endpoint = endpoint
        self._config = config
        self._server_tls = config.tls.context() if config.tls is not None else None
        peer_tls = config.peer_tls
        self._client_tls = Reloaded(peer_tls.paths, peer_tls.context) if peer_tls is not None else None
        self._reception = Reception(landings, epoch, checksums=config.checksums)
        self._listener = Listener(config.listen, self._reception, self._server_tls, config.most_connections)
        self._connections: dict[tuple[bytes, int], Outbound] = {}

    def offer(self) -> str | None:
        """See Transport.offer."""
        scheme = "tls" if self._server_tls is not None else "tcp"
        return f"{scheme}://{self._advertised()}"

    def refuses(self, source: Pool, address: KvAddress, peer: Peer) -> Unsupported | None:
        """See Transport.refuses."""
        if source.device_address is not None:
            return Unsupported("the pool is in memory of a GPU")
        return self._refuses(peer)

    def _refuses(self, peer: Peer) -> Unsupported | None:
        if peer.epoch == self._epoch:
            return Unsupported("the target belongs to this transfer service")
        scheme = peer.offers.get("tcp", "").partition("://")[0]
        if not scheme:
            return Unsupported("the receiver's transfer service has no data port")
        if (scheme == "tls") != (self._client_tls is not None):
            # Never in the clear where TLS was asked for.
            return Unsupported("one of the two transfer services wants TLS and the other does not")
        return None

    async def probe(self, peer: Peer) -> float | None:
        """See Transport.probe."""
        if self._refuses(peer) is not None:
            return None
        connection = await self._connect(peer, 0)
        try:
            round_trip_s = await self._probe(connection, 0)
            speed = 0.0
            for num_bytes in _PROBE_BYTES:
                elapsed_s = await self._probe(connection, num_bytes)
                speed = num_bytes / max(elapsed_s - round_trip_s, 1e-5)
                if elapsed_s > _PROBE_S:
                    break
        except PeerLost as error:
            raise TransportFailed(error.message) from None
        return speed

    async def open(self, request: PutRequest, on_change: Callable[[], None]) -> TcpLane | AlreadyCommitted:
        """See Transport.open."""
        layout, extent = request.source.shape.layout, request.source.shape.part.extent
        if layout.layer_page_bytes // layout.page_size > MAX_PUT_BYTES:
            raise LayoutMismatch(f"one token of one layer is more than {MAX_PUT_BYTES} bytes")
        statement = Statement(request.address, request.claim, request.part, layout, extent, self._config.checksums)
        connection, number, reply = await self._state(request.peer, statement, end=False)
        if reply.opened.already_committed:
            return AlreadyCommitted.VALUE
        lane = TcpLane(
            connection,
            number,
            request,
            self._config.max_frame_bytes,
            on_change,
            checksum=reply.opened.checksum,
            verbatim=reply.opened.verbatim,
        )
        connection.add(number, lane)
        return lane

    async def end_attempt(self, peer: Peer, address: KvAddress, claim: Claim) -> bool:
        """See Transport.end_attempt."""
        nothing = TokenRange(claim.range.begin, claim.range.begin)
        statement = Statement(address, claim, nothing, address.layout, address.whole, checksum=False)
        _, _, reply = await self._state(peer, statement, end=True)
        return reply.ended.committed

    async def close(self) -> None:
        """See Transport.close."""
        connections = tuple(self._connections.values())
        for connection in connections:
            connection.cut()
        for connection in connections:
            await asyncio.to_thread(connection.join)
        await self._listener.close()
        await self._reception.close()

    async def _state(self, peer: Peer, statement: Statement, *, end: bool) -> tuple[Outbound, int, pb.DataMessage]:
        """Makes a statement and returns the connection, its number there, and the answer. Nothing was written when it
        raises TransportFailed."""
        # All of an attempt over one connection, in order.
        slot = crc32(statement.address.reservation_id.encode()) % self._config.connections_per_peer
        connection = await self._connect(peer, slot)
        number = connection.new_number()
        stated = proved(statement, connection.challenge, number)
        message = pb.DataMessage(end_attempt=stated) if end else pb.DataMessage(open=stated)
        try:
            return connection, number, await connection.request(number, message)
        except PeerLost as error:
            raise TransportFailed(error.message) from None
        except asyncio.CancelledError:
            await connection.remove(number)
            raise

    async def _connect(self, peer: Peer, slot: int) -> Outbound:
        key = (peer.epoch, slot)
        connection = self._connections.get(key)
        if connection is None:
            name = f"kv-out {peer.endpoint}"
            connect = partial(_connect, peer.offers["tcp"], self._config.peer_tls, self._client_tls)
            connection = Outbound(name, (self._epoch, peer.epoch), connect, partial(self._ended, key))
            connection.start()
            self._connections[key] = connection
        try:
            await connection.ready()
        except ServiceError as error:
            raise TransportFailed(f"no connection to the data port: {error.message}") from None
        return connection

    def _ended(self, key: tuple[bytes, int], connection: Outbound) -> None:
        if self._connections.get(key) is connection:
            del self._connections[key]

    def _advertised(self) -> str:
        advertise = self._config.advertise
        bound_host, _ = split_address(self._listener.bound)
        if advertise is None and bound_host in ("0.0.0.0", "::"):
            advertise = split_address(self._endpoint())[0]
        return advertised_address(advertise, self._listener.bound)

    async def _probe(self, connection: Outbound, num_bytes: int) -> float:
        loop = asyncio.get_running_loop()
        number = connection.new_number()
        answer = connection.expect(number)
        begin_s = loop.time()
        connection.add(number, ProbeSource(number, num_bytes))
        try:
            await connection.answer(answer)
            return loop.time() - begin_s
        finally:
            await connection.remove(number)


def _connect(offer: str, tls: ClientTls | None, contexts: Reloaded[ssl.SSLContext] | None) -> Channel:
    """A connection to the data port of an offer; blocks for at most some seconds. Raises TransportFailed."""
    try:
        host, port = split_address(offer.partition("://")[2])
        connected = socket.create_connection((host, port), timeout=SILENCE_LIMIT_S)
    except (OSError, ValueError) as error:
        raise TransportFailed(f"{offer}: {error}") from None
    if tls is None or contexts is None:
        return Channel(connected)
    try:
        return Channel(contexts.latest().wrap_socket(connected, server_hostname=tls.server_name or host))
    except OSError as error:
        connected.close()
        raise TransportFailed(f"{offer}: {error}") from None
