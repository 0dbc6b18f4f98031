"""Asking another transfer service who it is, over its gRPC port."""

from __future__ import annotations

from microserve.kvtransfer.v1 import kvtransfer_pb2 as pb
from microserve.kvtransfer.v1 import kvtransfer_pb2_grpc as pb_grpc

from services.kvtransfer.errors import NoTransport, PeerUnreachable
from services.kvtransfer.transports.base import PEER_VERSION, Peer
from services.rpc.bind import split_address
from services.rpc.channel import make_channel
from services.rpc.status import RemoteError, remote_errors
from services.rpc.tls import ClientTls, check_client

ASK_TIMEOUT_S = 5.0


class PeerClient:
    """Opens a channel for each question: one is asked once an incarnation of the peer."""

    def __init__(self, tls: ClientTls | None) -> None:
        """StartError if the files of `tls` cannot be used."""
        check_client(tls)
        self._tls = tls

    async def ask(self, endpoint: str) -> Peer:
        """What the service at host:port tells of itself. Raises PeerUnreachable, and NoTransport if it
        is of another version: trying again changes nothing, and neither engine is at fault."""
        try:
            split_address(endpoint)
        except ValueError as error:
            raise PeerUnreachable(f"the receiver's transfer service: {error}") from None
        async with make_channel(endpoint, self._tls) as channel:
            stub: pb_grpc.KvTransferServiceAsyncStub = pb_grpc.KvTransferServiceStub(channel)
            try:
                with remote_errors():
                    reply = await stub.GetInfo(pb.GetInfoRequest(), timeout=ASK_TIMEOUT_S)
            except RemoteError as error:
                raise PeerUnreachable(f"the transfer service at {endpoint} does not answer: {error.message}") from None
        if reply.peer_version != PEER_VERSION:
            raise NoTransport(
                f"the transfer service at {endpoint} speaks version {reply.peer_version}, this one {PEER_VERSION}"
            )
        return Peer(endpoint, reply.epoch, {offer.name: offer.detail for offer in reply.offers})
