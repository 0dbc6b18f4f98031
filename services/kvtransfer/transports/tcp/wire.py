"""Frames on a connection between two services; protos/microserve/kvtransfer/v1/data.proto defines them."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from google.protobuf.message import DecodeError
from microserve.kvtransfer.v1 import data_pb2 as pb

from services.kvtransfer import errors as kvtransfer_errors
from services.kvtransfer.errors import ProtocolViolation
from services.protocol import errors as protocol_errors
from services.protocol.errors import ServiceError
from services.rpc.status import from_error_message, to_error_message

# The largest frames that are taken. A message holds at most the page ids of one reservation.
MAX_PUT_BYTES = 8 << 20
MAX_MESSAGE_BYTES = 1 << 20


class Kind(IntEnum):
    """What a frame is."""

    MESSAGE = 1
    PUT = 2
    LANDED = 3
    BEAT = 4
    DISCARD = 5


_MOST_BYTES = {
    Kind.MESSAGE: MAX_MESSAGE_BYTES,
    Kind.PUT: MAX_PUT_BYTES,
    Kind.LANDED: 0,
    Kind.BEAT: 0,
    Kind.DISCARD: MAX_PUT_BYTES,
}


@dataclass(frozen=True, slots=True)
class Header:
    """The fixed part of a frame."""

    kind: Kind
    number: int = 0
    layer: int = 0
    begin: int = 0
    end: int = 0
    length: int = 0
    checksum: int = 0

    def encode(self) -> bytes:
        """The bytes on the wire."""
        return _HEADER.pack(self.kind, self.number, self.layer, self.begin, self.end, self.length, self.checksum)

    @classmethod
    def decode(cls, data: bytes | bytearray | memoryview) -> Header:
        """Raises ProtocolViolation for what no service of this version sends."""
        kind, *fields = _HEADER.unpack(data)
        try:
            header = cls(Kind(kind), *fields)
        except ValueError:
            raise ProtocolViolation(f"there is no frame of kind {kind}") from None
        if header.length > _MOST_BYTES[header.kind]:
            raise ProtocolViolation(f"a frame {header.kind.name} of {header.length} bytes")
        return header


_HEADER = struct.Struct("!B3xIIIIIQ")
HEADER_BYTES = _HEADER.size


def encode_message(number: int, message: pb.DataMessage) -> bytes:
    """A whole MESSAGE frame."""
    body = message.SerializeToString()
    return Header(Kind.MESSAGE, number, length=len(body)).encode() + body


def encode_error(number: int, error: ServiceError) -> bytes:
    """A whole MESSAGE frame that tells of a failure."""
    return encode_message(number, pb.DataMessage(error=to_error_message(error)))


def decode_message(body: bytes | bytearray | memoryview) -> pb.DataMessage:
    """Raises ProtocolViolation."""
    try:
        return pb.DataMessage.FromString(bytes(body))
    except DecodeError:
        raise ProtocolViolation("a message that cannot be read") from None


def to_error(message: pb.DataMessage) -> ServiceError:
    """The peer's error as one of ours, so that those who handle a class of errors handle the peer's, too."""
    remote = from_error_message(message.error)
    known = _LEAVES.get(remote.reason)
    if known is None:
        return remote
    return known(remote.message, retry_delay_s=remote.retry_delay_s)


def _leaves(root: type[ServiceError]) -> dict[str, type[ServiceError]]:
    found = {root.reason: root}
    for leaf in root.__subclasses__():
        found |= _leaves(leaf)
    return found


_LEAVES = _leaves(protocol_errors.ProtocolError) | _leaves(kvtransfer_errors.KvTransferError)
