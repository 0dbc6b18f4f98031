"""What a sender states about a put, and the proof that it may."""

from __future__ import annotations

from dataclasses import dataclass, replace

from google.protobuf.message import DecodeError
from microserve.kvtransfer.v1 import data_pb2 as pb

from services.kvtransfer.convert import to_address, to_layout, to_range
from services.kvtransfer.errors import InvalidRequest, ProtocolViolation
from services.kvtransfer.landing import Claim
from services.protocol.address import KvAddress
from services.protocol.extents import Extent
from services.protocol.grants import prove
from services.protocol.layout import PageLayout
from services.protocol.ranges import TokenRange
from services.rpc.kv_messages import address_message, layout_message, range_message

# A service puts names of its own before that of the writer.
_MAX_WRITER_CHARACTERS = 1_024


@dataclass(frozen=True, slots=True)
class Statement:
    """One put, or one attempt. At the receiver the address has no secret until the proof was checked."""

    address: KvAddress
    claim: Claim
    part: TokenRange
    source_layout: PageLayout
    extent: Extent  # what of the model the sender's pool holds
    checksum: bool

    def encode(self) -> bytes:
        """A serialized PutStatement, without the secret."""
        message = pb.PutStatement(
            target=address_message(replace(self.address, secret=b"")),
            attempt=self.claim.number,
            attempt_range=range_message(self.claim.range),
            writer_id=self.claim.writer_id,
            range=range_message(self.part),
            source_layout=layout_message(self.source_layout),
            layer_begin=self.extent.layers[0],
            kv_head_begin=self.extent.kv_heads[0],
            checksum=self.checksum,
        )
        return message.SerializeToString()

    @classmethod
    def decode(cls, data: bytes) -> Statement:
        """Raises ProtocolViolation, InvalidRange, InvalidRequest or LayoutMismatch."""
        try:
            message = pb.PutStatement.FromString(data)
        except DecodeError:
            raise ProtocolViolation("a statement that cannot be read") from None
        if message.attempt < 1 or not 0 < len(message.writer_id) <= _MAX_WRITER_CHARACTERS:
            raise InvalidRequest("an attempt without number or writer")
        layout = to_layout(message.source_layout)
        layers, kv_heads = message.layer_begin, message.kv_head_begin
        return cls(
            replace(to_address(message.target), secret=b""),
            Claim(to_range(message.attempt_range), message.attempt, message.writer_id),
            to_range(message.range),
            layout,
            Extent((layers, layers + layout.layer_count), (kv_heads, kv_heads + layout.kv_head_count)),
            message.checksum,
        )


def proved(statement: Statement, challenge: bytes, number: int) -> pb.ProvedStatement:
    """The statement with the proof that its maker knows the secret."""
    data = statement.encode()
    proof = prove(statement.address.secret, challenge_of(challenge, number, data))
    return pb.ProvedStatement(statement=data, proof=proof)


def challenge_of(challenge: bytes, number: int, statement: bytes) -> bytes:
    """What a proof is made over: good for one statement, once, on one connection."""
    return challenge + number.to_bytes(4, "big") + statement
