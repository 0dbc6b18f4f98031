"""An engine of the tests: owns a pool, opens windows in it and pushes out of it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import numpy as np
from microserve.kvtransfer.v1 import kvtransfer_pb2 as pb
from microserve.types.v1 import kv_pb2
from numpy.typing import NDArray

from services.kvtransfer.convert import to_layout
from services.rpc.pool_client import AttachedPool, attach_pool
from tests.kvtransfer.pattern import POISON, pattern
from tests.kvtransfer.port import Port
from tests.kvtransfer.streams import Pushing


@dataclass(frozen=True, slots=True)
class Shape:
    """A pool of float32 pages, small unless a test wants it large."""

    layers: int = 3
    heads: int = 2
    head_dim: int = 4
    page_size: int = 4
    pages: int = 16
    dtype: int = kv_pb2.DTYPE_FLOAT32
    order: int = kv_pb2.PAGE_ORDER_KV_HEAD_TOKEN_DIM
    # Which part of which model it is; all of it unless stated.
    first_layer: int = 0
    first_head: int = 0
    model_layers: int = 0
    model_heads: int = 0

    def layout(self) -> kv_pb2.PageLayout:
        return kv_pb2.PageLayout(
            layer_count=self.layers,
            kv_head_count=self.heads,
            head_dim=self.head_dim,
            page_size=self.page_size,
            dtype=self.dtype,
            order=self.order,
        )

    def part(self) -> pb.ModelPart | None:
        if not self.model_layers:
            return None
        return pb.ModelPart(
            layer_begin=self.first_layer,
            kv_head_begin=self.first_head,
            model_layer_count=self.model_layers,
            model_kv_head_count=self.model_heads,
        )

    def shard(self, pool_id: str, pages: list[int]) -> kv_pb2.KvShard:
        return kv_pb2.KvShard(
            pool_id=pool_id,
            layer_begin=self.first_layer,
            layer_end=self.first_layer + self.layers,
            kv_head_begin=self.first_head,
            kv_head_end=self.first_head + self.heads,
            page_ids=pages,
        )

    @property
    def layer_token_bytes(self) -> int:
        return 2 * self.heads * self.head_dim * to_layout(self.layout()).dtype.size_bytes

    def page_count_of(self, begin: int, end: int) -> int:
        return (end - 1) // self.page_size - begin // self.page_size + 1


class FakeEngine:
    """Lives in the test's process. `start` makes and attaches its pool; `close` is its death."""

    def __init__(self, port: Port, name: str, shape: Shape | None = None) -> None:
        self.port, self.name, self.shape = port, name, shape or Shape()
        self.incarnation = os.urandom(16)
        self._pool: AttachedPool | None = None
        self.pool_id = ""
        self.epoch = b""
        self.endpoint = ""

    async def create(self, **fields: Any) -> Any:
        request = {"engine_name": self.name, "layout": self.shape.layout(), "page_count": self.shape.pages}
        if (part := self.shape.part()) is not None:
            request["part"] = part
        reply = await self.port.call("CreatePool", pb.CreatePoolRequest(**{**request, **fields}))
        self.pool_id, self.epoch = reply.pool_id, reply.epoch
        return reply

    async def invitation(self) -> Any:
        request = pb.AttachPoolRequest(pool_id=self.pool_id, incarnation=self.incarnation)
        reply = await self.port.call("AttachPool", request)
        self.endpoint = reply.endpoint
        return reply

    async def attach(self) -> None:
        reply = await self.invitation()
        self._pool = await asyncio.to_thread(attach_pool, reply.socket_path, reply.ticket)

    async def start(self, *, seed: int | None = None) -> FakeEngine:
        """Fills the pool with a pattern, or with poison."""
        await self.create()
        await self.attach()
        self.memory[:] = POISON if seed is None else pattern(seed, len(self.memory))
        return self

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()

    @property
    def pool(self) -> AttachedPool:
        assert self._pool is not None
        return self._pool

    @property
    def memory(self) -> NDArray[np.uint8]:
        return self.pool.memory

    @property
    def tokens(self) -> NDArray[np.uint8]:
        """(layer, page, k|v and head, token in the page, byte)"""
        shape = self.shape
        token_bytes = shape.layer_token_bytes // (2 * shape.heads)
        return self.memory.reshape(shape.layers, shape.pages, 2 * shape.heads, shape.page_size, token_bytes)

    async def grant(self, reservation: str, begin: int, end: int, pages: list[int]) -> kv_pb2.KvAddress:
        """Opens a window; returns its address."""
        address = kv_pb2.KvAddress(
            reservation_id=reservation,
            endpoint=self.endpoint,
            epoch=self.epoch,
            secret=os.urandom(16),
            window=kv_pb2.TokenRange(begin=begin, end=end),
            shards=[self.shape.shard(self.pool_id, pages)],
            layout=self.shape.layout(),
        )
        request = pb.GrantRequest(
            pool_id=self.pool_id,
            incarnation=self.incarnation,
            reservation_id=reservation,
            secret=address.secret,
            window=address.window,
            page_ids=pages,
        )
        await self.port.call("Grant", request)
        return address

    async def revoke(self, reservation: str) -> pb.RevokeResponse:
        request = pb.RevokeRequest(pool_id=self.pool_id, incarnation=self.incarnation, reservation_id=reservation)
        response = await self.port.call("Revoke", request)
        assert isinstance(response, pb.RevokeResponse)
        return response

    def order(self, address: kv_pb2.KvAddress, begin: int, end: int, pages: list[int], **fields: Any) -> pb.PushRequest:
        """A push of [begin, end) that is an attempt of its own, unless `fields` say otherwise."""
        given: dict[str, Any] = {
            "pool_id": self.pool_id,
            "incarnation": self.incarnation,
            "page_ids": pages,
            "range": kv_pb2.TokenRange(begin=begin, end=end),
            "target": address,
            "attempt": 1,
            "attempt_range": kv_pb2.TokenRange(begin=begin, end=end),
            "writer_id": "request",
        }
        return pb.PushRequest(**{**given, **fields})

    def push(self, order: pb.PushRequest) -> Pushing:
        """Begins it."""
        return Pushing(self.port.stream("Push", order))

    async def end_attempt(self, order: pb.PushRequest) -> bool:
        request = pb.EndAttemptRequest(
            pool_id=order.pool_id,
            incarnation=order.incarnation,
            target=order.target,
            attempt=order.attempt,
            attempt_range=order.attempt_range,
            writer_id=order.writer_id,
        )
        committed: bool = (await self.port.call("EndAttempt", request)).committed
        return committed

    def watch(self) -> AsyncGenerator[Any, None]:
        request = pb.WatchGrantsRequest(pool_id=self.pool_id, incarnation=self.incarnation)
        return self.port.stream("WatchGrants", request)
