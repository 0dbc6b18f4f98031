"""Ranges, layouts and addresses as messages of types.v1. The way back is each service's own, with its own refusals."""

from __future__ import annotations

from microserve.types.v1 import kv_pb2

from services.protocol.address import KvAddress, KvShard
from services.protocol.layout import PageLayout
from services.protocol.ranges import TokenRange


def range_message(tokens: TokenRange) -> kv_pb2.TokenRange:
    """A range as a message."""
    return kv_pb2.TokenRange(begin=tokens.begin, end=tokens.end)


def layout_message(layout: PageLayout) -> kv_pb2.PageLayout:
    """A layout as a message."""
    return kv_pb2.PageLayout(
        layer_count=layout.layer_count,
        kv_head_count=layout.kv_head_count,
        head_dim=layout.head_dim,
        page_size=layout.page_size,
        dtype=kv_pb2.Dtype.Value(f"DTYPE_{layout.dtype.value}"),
        order=kv_pb2.PageOrder.Value(f"PAGE_ORDER_{layout.order.value}"),
    )


def address_message(address: KvAddress) -> kv_pb2.KvAddress:
    """An address as a message, secret included."""
    return kv_pb2.KvAddress(
        reservation_id=address.reservation_id,
        endpoint=address.endpoint,
        epoch=address.epoch,
        secret=address.secret,
        window=range_message(address.window),
        shards=[_shard_message(shard) for shard in address.shards],
        layout=layout_message(address.layout),
        model_digest=address.model_digest,
        prompt_digest=address.prompt_digest,
    )


def _shard_message(shard: KvShard) -> kv_pb2.KvShard:
    return kv_pb2.KvShard(
        pool_id=shard.pool_id,
        layer_begin=shard.layers[0],
        layer_end=shard.layers[1],
        kv_head_begin=shard.kv_heads[0],
        kv_head_end=shard.kv_heads[1],
        page_ids=shard.page_ids,
    )
