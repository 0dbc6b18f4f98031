"""A pool of a transfer service that is in our hands, as an engine's is in the engine's."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass

import grpc.aio
import numpy as np
from microserve.kvtransfer.v1 import kvtransfer_pb2 as pb
from microserve.kvtransfer.v1.kvtransfer_pb2_grpc import KvTransferServiceStub
from microserve.types.v1 import kv_pb2
from numpy.typing import NDArray

from services.rpc.pool_client import AttachedPool, attach_pool

_TIMEOUT_S = 120.0
_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class PoolSize:
    """Layers, KV heads, values in a head, tokens in a page, pages, bytes a value (2 or 4)."""

    layers: int
    kv_heads: int
    head_dim: int
    page_size: int
    pages: int
    value_bytes: int

    @property
    def page_bytes(self) -> int:
        """Of one layer."""
        return 2 * self.kv_heads * self.page_size * self.head_dim * self.value_bytes

    @property
    def num_bytes(self) -> int:
        """Of the pool."""
        return self.layers * self.pages * self.page_bytes

    @property
    def tokens(self) -> int:
        """That fit in."""
        return self.pages * self.page_size

    def layout(self) -> kv_pb2.PageLayout:
        """As a message."""
        return kv_pb2.PageLayout(
            layer_count=self.layers,
            kv_head_count=self.kv_heads,
            head_dim=self.head_dim,
            page_size=self.page_size,
            dtype=kv_pb2.DTYPE_FLOAT32 if self.value_bytes == 4 else kv_pb2.DTYPE_BFLOAT16,
            order=kv_pb2.PAGE_ORDER_KV_HEAD_TOKEN_DIM,
        )


class BenchPool:
    """Made by `make_pool`."""

    def __init__(self, channel: grpc.aio.Channel, size: PoolSize) -> None:
        self.stub = KvTransferServiceStub(channel)
        self.size = size
        self._incarnation = os.urandom(16)
        self._created = pb.CreatePoolResponse()
        self._attached = pb.AttachPoolResponse()
        self._pool: AttachedPool | None = None

    async def open(self) -> None:
        """Makes and attaches it."""
        name = f"kv-bench-{os.getpid()}-{next(_numbers)}"
        request = pb.CreatePoolRequest(engine_name=name, layout=self.size.layout(), page_count=self.size.pages)
        self._created = await self.stub.CreatePool(request, timeout=_TIMEOUT_S)
        attach = pb.AttachPoolRequest(pool_id=self._created.pool_id, incarnation=self._incarnation)
        self._attached = await self.stub.AttachPool(attach, timeout=_TIMEOUT_S)
        self._pool = await asyncio.to_thread(attach_pool, self._attached.socket_path, self._attached.ticket)

    def close(self) -> None:
        """The engine is gone."""
        if self._pool is not None:
            self._pool.close()

    @property
    def memory(self) -> NDArray[np.uint8]:
        """The bytes, as the service maps them too."""
        assert self._pool is not None
        return self._pool.memory

    async def grant(self, pages: Sequence[int]) -> kv_pb2.KvAddress:
        """Opens a window over so many pages, from position 0 on."""
        address = kv_pb2.KvAddress(
            reservation_id=f"bench-{next(_numbers)}",
            endpoint=self._attached.endpoint,
            epoch=self._created.epoch,
            secret=os.urandom(16),
            window=kv_pb2.TokenRange(begin=0, end=len(pages) * self.size.page_size),
            shards=[
                kv_pb2.KvShard(
                    pool_id=self._created.pool_id,
                    layer_end=self.size.layers,
                    kv_head_end=self.size.kv_heads,
                    page_ids=pages,
                )
            ],
            layout=self.size.layout(),
        )
        request = pb.GrantRequest(
            pool_id=self._created.pool_id,
            incarnation=self._incarnation,
            reservation_id=address.reservation_id,
            secret=address.secret,
            window=address.window,
            page_ids=pages,
        )
        await self.stub.Grant(request, timeout=_TIMEOUT_S)
        return address

    async def revoke(self, address: kv_pb2.KvAddress) -> None:
        """Closes it."""
        request = pb.RevokeRequest(
            pool_id=self._created.pool_id, incarnation=self._incarnation, reservation_id=address.reservation_id
        )
        await self.stub.Revoke(request, timeout=_TIMEOUT_S)

    async def push(self, pages: Sequence[int], address: kv_pb2.KvAddress) -> pb.PushResponse:
        """Moves pages into the window; the last message."""
        request = pb.PushRequest(
            pool_id=self._created.pool_id,
            incarnation=self._incarnation,
            page_ids=pages,
            range=address.window,
            target=address,
            attempt=1,
            attempt_range=address.window,
            writer_id="bench",
        )
        return [message async for message in self.stub.Push(request, timeout=_TIMEOUT_S)][-1]
