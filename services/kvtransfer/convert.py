"""Messages of kvtransfer.v1 and types.v1 to the service's own data; what no sender may send is refused."""

from __future__ import annotations

from microserve.kvtransfer.v1 import kvtransfer_pb2 as pb
from microserve.types.v1 import kv_pb2

from services.kvtransfer.errors import InvalidRequest
from services.kvtransfer.landing import Claim
from services.protocol.address import KvAddress, KvShard
from services.protocol.errors import LayoutMismatch
from services.protocol.extents import Extent, ModelPart
from services.protocol.layout import Dtype, PageLayout, PageOrder
from services.protocol.ranges import TokenRange

_TOKEN_BYTES = 16
_MAX_ID_CHARACTERS = 512


def token(value: bytes, field: str) -> bytes:
    """Sixteen bytes: a secret, an epoch or an incarnation. Raises InvalidRequest."""
    if len(value) != _TOKEN_BYTES:
        raise InvalidRequest(f"{field} has {_TOKEN_BYTES} bytes")
    return value


def identifier(value: str, field: str) -> str:
    """A name that a caller chose. Raises InvalidRequest if it is empty or too long."""
    if not 0 < len(value) <= _MAX_ID_CHARACTERS:
        raise InvalidRequest(f"{field} has 1 to {_MAX_ID_CHARACTERS} characters")
    return value


def to_range(message: kv_pb2.TokenRange) -> TokenRange:
    """Raises InvalidRange."""
    return TokenRange(message.begin, message.end)


def to_claim(claimed: kv_pb2.TokenRange, number: int, writer_id: str) -> Claim:
    """Raises InvalidRange or InvalidRequest."""
    if number < 1:
        raise InvalidRequest("attempts count from 1")
    return Claim(to_range(claimed), number, identifier(writer_id, "writer_id"))


def to_part(layout: PageLayout, part: pb.ModelPart | None) -> ModelPart:
    """What a pool of that layout holds; all of its model if `part` is None. Raises LayoutMismatch."""
    if part is None:
        return ModelPart.all_of(layout.layer_count, layout.kv_head_count)
    layers = (part.layer_begin, part.layer_begin + layout.layer_count)
    kv_heads = (part.kv_head_begin, part.kv_head_begin + layout.kv_head_count)
    whole = Extent((0, part.model_layer_count), (0, part.model_kv_head_count))
    return ModelPart(Extent(layers, kv_heads), whole)


def to_layout(message: kv_pb2.PageLayout) -> PageLayout:
    """Raises LayoutMismatch for what no pool can have."""
    try:
        dtype = Dtype(kv_pb2.Dtype.Name(message.dtype).removeprefix("DTYPE_"))
        order = PageOrder(kv_pb2.PageOrder.Name(message.order).removeprefix("PAGE_ORDER_"))
    except ValueError:
        raise LayoutMismatch("the layout's number format or order of axes is unknown") from None
    return PageLayout(message.layer_count, message.kv_head_count, message.head_dim, message.page_size, dtype, order)


def to_address(message: kv_pb2.KvAddress) -> KvAddress:
    """Raises InvalidRange, InvalidRequest or LayoutMismatch."""
    shards = tuple(
        KvShard(
            shard.pool_id,
            (shard.layer_begin, shard.layer_end),
            (shard.kv_head_begin, shard.kv_head_end),
            tuple(shard.page_ids),
        )
        for shard in message.shards
    )
    return KvAddress(
        identifier(message.reservation_id, "target.reservation_id"),
        message.endpoint,
        message.epoch,
        message.secret,
        to_range(message.window),
        shards,
        to_layout(message.layout),
        message.model_digest,
        message.prompt_digest,
    )
