"""kvtransfer.v1 over gRPC. The server's side of the contract."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc.aio
from google.protobuf.duration_pb2 import Duration
from microserve.kvtransfer.v1 import kvtransfer_pb2 as pb
from microserve.kvtransfer.v1 import kvtransfer_pb2_grpc as pb_grpc
from microserve.types.v1 import kv_pb2

from services.kvtransfer.books import Stats
from services.kvtransfer.errors import InvalidPool, InvalidRequest, PushCancelled
from services.kvtransfer.landing import Claim
from services.kvtransfer.peer_client import PEER_VERSION
from services.kvtransfer.pool import PoolShape
from services.kvtransfer.push import PushProgress
from services.kvtransfer.pushes import PushOrder
from services.kvtransfer.service import KvTransfer
from services.kvtransfer.watch import GrantBatch
from services.protocol.address import KvAddress, KvShard
from services.protocol.errors import LayoutMismatch
from services.protocol.grants import GrantKey, GrantSpec
from services.protocol.layout import Dtype, PageLayout, PageOrder
from services.protocol.ranges import TokenRange

# A string: generic in the stubs only.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_TOKEN_BYTES = 16
_MAX_ID_CHARACTERS = 512


class KvTransferServicer(pb_grpc.KvTransferServiceServicer):
    """Translates, and nothing else."""

    def __init__(self, service: KvTransfer) -> None:
        self._service = service

    async def CreatePool(self, request: pb.CreatePoolRequest, context: Context) -> pb.CreatePoolResponse:
        try:
            shape = PoolShape(_layout(request.layout), request.page_count)
        except LayoutMismatch as error:
            raise InvalidPool(error.message) from None
        pool = await self._service.create_pool(request.engine_name, shape, adopt=request.adopt)
        return pb.CreatePoolResponse(pool_id=pool.id, epoch=self._service.epoch, size_bytes=shape.size_bytes)

    async def AttachPool(self, request: pb.AttachPoolRequest, context: Context) -> pb.AttachPoolResponse:
        incarnation = _token(request.incarnation, "incarnation")
        attachment = await self._service.attach_pool(request.pool_id, incarnation)
        return pb.AttachPoolResponse(
            socket_path=attachment.socket_path,
            ticket=attachment.ticket,
            endpoint=attachment.endpoint,
            ready_slot_count=attachment.ready_slot_count,
        )

    async def Grant(self, request: pb.GrantRequest, context: Context) -> pb.GrantResponse:
        spec = GrantSpec(
            GrantKey(request.pool_id, _id(request.reservation_id, "reservation_id")),
            _token(request.secret, "secret"),
            _range(request.window),
            tuple(request.page_ids),
        )
        self._service.grant(request.incarnation, spec)
        return pb.GrantResponse()

    async def Revoke(self, request: pb.RevokeRequest, context: Context) -> pb.RevokeResponse:
        await self._service.revoke(
            request.incarnation, GrantKey(request.pool_id, _id(request.reservation_id, "reservation_id"))
        )
        return pb.RevokeResponse()

    async def Push(self, request: pb.PushRequest, context: Context) -> AsyncGenerator[pb.PushResponse, None]:
        order = PushOrder(
            request.pool_id,
            request.incarnation,
            tuple(request.page_ids),
            _range(request.range),
            _address(request.target),
            _claim(request.attempt_range, request.attempt, request.writer_id),
            request.ready_slot if request.HasField("ready_slot") else None,
        )
        push = await self._service.push(order)
        try:
            async with aclosing(push.updates()) as updates:
                async for progress in updates:
                    yield _progress(progress)
        finally:
            push.stop(PushCancelled("the caller left"))
            await push.ended()

    async def EndAttempt(self, request: pb.EndAttemptRequest, context: Context) -> pb.EndAttemptResponse:
        claim = _claim(request.attempt_range, request.attempt, request.writer_id)
        address = _address(request.target)
        committed = await self._service.end_attempt(request.pool_id, request.incarnation, address, claim)
        return pb.EndAttemptResponse(committed=committed)

    async def WatchGrants(
        self, request: pb.WatchGrantsRequest, context: Context
    ) -> AsyncGenerator[pb.WatchGrantsResponse, None]:
        async with aclosing(self._service.watch_grants(request.pool_id, request.incarnation)) as batches:
            async for batch in batches:
                yield _batch(batch)

    async def GetInfo(self, request: pb.GetInfoRequest, context: Context) -> pb.GetInfoResponse:
        peer = self._service.info()
        offers = [pb.TransportOffer(name=name, detail=detail) for name, detail in peer.offers.items()]
        return pb.GetInfoResponse(peer_version=PEER_VERSION, epoch=peer.epoch, offers=offers)

    async def GetStats(self, request: pb.GetStatsRequest, context: Context) -> pb.GetStatsResponse:
        return _stats(self._service.stats())


def _token(value: bytes, field: str) -> bytes:
    if len(value) != _TOKEN_BYTES:
        raise InvalidRequest(f"{field} has {_TOKEN_BYTES} bytes")
    return value


def _id(value: str, field: str) -> str:
    if not 0 < len(value) <= _MAX_ID_CHARACTERS:
        raise InvalidRequest(f"{field} has 1 to {_MAX_ID_CHARACTERS} characters")
    return value


def _range(message: kv_pb2.TokenRange) -> TokenRange:
    return TokenRange(message.begin, message.end)


def _claim(claimed: kv_pb2.TokenRange, number: int, writer_id: str) -> Claim:
    if number < 1:
        raise InvalidRequest("attempts count from 1")
    return Claim(_range(claimed), number, _id(writer_id, "writer_id"))


def _layout(message: kv_pb2.PageLayout) -> PageLayout:
    """Raises LayoutMismatch for what no pool can have."""
    try:
        dtype = Dtype(kv_pb2.Dtype.Name(message.dtype).removeprefix("DTYPE_"))
        order = PageOrder(kv_pb2.PageOrder.Name(message.order).removeprefix("PAGE_ORDER_"))
    except ValueError:
        raise LayoutMismatch("the layout's number format or order of axes is unknown") from None
    return PageLayout(message.layer_count, message.kv_head_count, message.head_dim, message.page_size, dtype, order)


def _address(message: kv_pb2.KvAddress) -> KvAddress:
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
        _id(message.reservation_id, "target.reservation_id"),
        message.endpoint,
        message.epoch,
        message.secret,
        _range(message.window),
        shards,
        _layout(message.layout),
        message.model_digest,
        message.prompt_digest,
    )


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


def _progress(progress: PushProgress) -> pb.PushResponse:
    return pb.PushResponse(
        state=pb.PushState.Value(f"PUSH_STATE_{progress.state.value}"),
        layers_done=progress.layers_done,
        bytes=progress.num_bytes,
        transport=progress.transport,
        exposed=_duration(progress.exposed_s) if progress.state.last else None,
    )


def _batch(batch: GrantBatch) -> pb.WatchGrantsResponse:
    events = [
        pb.GrantEvent(
            reservation_id=status.key.reservation_id,
            state=pb.GrantState.Value(f"GRANT_STATE_{status.state.value}"),
            committed=[kv_pb2.TokenRange(begin=r.begin, end=r.end) for r in status.committed],
            bytes=status.bytes,
        )
        for status in batch.events
    ]
    return pb.WatchGrantsResponse(events=events, snapshot=batch.snapshot)


def _stats(stats: Stats) -> pb.GetStatsResponse:
    response = pb.GetStatsResponse(epoch=stats.epoch, refused_write_count=stats.refused_writes)
    for pool in stats.pools:
        response.pools.add(
            pool_id=pool.pool_id,
            engine_name=pool.engine_name,
            size_bytes=pool.size_bytes,
            attached=pool.attached,
            grant_count=pool.grants,
            push_count=pool.pushes,
            received_bytes=pool.received_bytes,
            sent_bytes=pool.sent_bytes,
        )
    for name, counters in stats.transports:
        response.transports.add(
            name=name,
            push_count=counters.pushes,
            bytes=counters.num_bytes,
            failure_count=counters.failures,
            busy=_duration(counters.busy_s),
        )
    for link in stats.links:
        speeds = [
            pb.TransportSpeed(transport=name, bytes_per_second=speed) for name, speed in link.bytes_per_second.items()
        ]
        response.links.add(
            endpoint=link.peer.endpoint,
            epoch=link.peer.epoch,
            transport=link.transport,
            speeds=speeds,
            fallback_count=link.fallbacks,
            last_fallback=link.last_fallback,
        )
    return response
