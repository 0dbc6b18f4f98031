"""An engine whose KV is split over several pools, and what a push between two such engines must leave behind."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from microserve.kvtransfer.v1 import kvtransfer_pb2 as pb
from microserve.types.v1 import kv_pb2
from numpy.typing import NDArray

from services.kvtransfer.convert import to_layout
from tests.kvtransfer.canonical import read_token, write_token
from tests.kvtransfer.engine import FakeEngine, Shape
from tests.kvtransfer.streams import Pushing

# (layers, heads) of each rank, as half-open ranges of the model's.
Split = Sequence[tuple[tuple[int, int], tuple[int, int]]]


def shapes_of(model: Shape, split: Split) -> list[Shape]:
    """The pool of every rank."""
    return [
        replace(
            model,
            layers=layers[1] - layers[0],
            heads=heads[1] - heads[0],
            first_layer=layers[0],
            first_head=heads[0],
            model_layers=model.layers,
            model_heads=model.heads,
        )
        for layers, heads in split
    ]


class RankedEngine:
    """Ranks that are one engine: they share an incarnation."""

    def __init__(self, model: Shape, ranks: Sequence[FakeEngine]) -> None:
        self.model, self.ranks = model, ranks

    async def grant(self, reservation: str, begin: int, end: int, pages: Sequence[list[int]]) -> kv_pb2.KvAddress:
        """Opens a window in all pools; `pages` of each rank."""
        first, *others = self.ranks
        address = kv_pb2.KvAddress(
            reservation_id=reservation,
            endpoint=first.endpoint,
            epoch=first.epoch,
            secret=os.urandom(16),
            window=kv_pb2.TokenRange(begin=begin, end=end),
            shards=[rank.shape.shard(rank.pool_id, ids) for rank, ids in zip(self.ranks, pages, strict=True)],
            layout=self.model.layout(),
        )
        request = pb.GrantRequest(
            pool_id=first.pool_id,
            incarnation=first.incarnation,
            reservation_id=reservation,
            secret=address.secret,
            window=address.window,
            page_ids=pages[0],
            other_pools=[
                pb.PoolPages(pool_id=rank.pool_id, page_ids=ids) for rank, ids in zip(others, pages[1:], strict=True)
            ],
        )
        await first.port.call("Grant", request)
        return address

    def push(
        self, rank: int, address: kv_pb2.KvAddress, begin: int, end: int, pages: list[int], **fields: Any
    ) -> Pushing:
        """One rank's push."""
        engine = self.ranks[rank]
        return engine.push(engine.order(address, begin, end, pages, **fields))

    def memories(self) -> list[NDArray[np.uint8]]:
        """Copies of all pools, (layers, pages, bytes) each."""
        return [rank.memory.reshape(rank.shape.layers, rank.shape.pages, -1).copy() for rank in self.ranks]


def expected(
    source: RankedEngine,
    source_pages: Sequence[list[int]],
    target: RankedEngine,
    before: Sequence[NDArray[np.uint8]],
    target_pages: Sequence[list[int]],
    begin: int,
    end: int,
) -> list[NDArray[np.uint8]]:
    """`before` with the tokens moved value by value; pages begin at `begin` on both sides."""
    after = [memory.copy() for memory in before]
    sent = source.memories()
    for layer in range(source.model.layers):
        for head in range(source.model.heads):
            i, j = _holder(source, layer, head), _holder(target, layer, head)
            for position in range(begin, end):
                value = read_token(
                    sent[i], *_where(source.ranks[i].shape, source_pages[i], layer, head, begin, position)
                )
                place = _where(target.ranks[j].shape, target_pages[j], layer, head, begin, position)
                write_token(after[j], *place, value)
    return after


def _holder(engine: RankedEngine, layer: int, head: int) -> int:
    """The rank that has it."""
    (found,) = [
        index
        for index, rank in enumerate(engine.ranks)
        if rank.shape.first_layer <= layer < rank.shape.first_layer + rank.shape.layers
        and rank.shape.first_head <= head < rank.shape.first_head + rank.shape.heads
    ]
    return found


def _where(shape: Shape, pages: list[int], layer: int, head: int, begin: int, position: int) -> tuple[Any, ...]:
    """The layout, the place and the head within the rank, as canonical.py wants them."""
    page, token = divmod(position, shape.page_size)
    place = (layer - shape.first_layer, pages[page - begin // shape.page_size], token)
    return to_layout(shape.layout()), place, head - shape.first_head
