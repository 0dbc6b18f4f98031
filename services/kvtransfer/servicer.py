"""kvtransfer.v1 over gRPC. The server's side of the contract."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc.aio
from microserve.kvtransfer.v1 import kvtransfer_pb2 as pb
from microserve.kvtransfer.v1 import kvtransfer_pb2_grpc as pb_grpc
from microserve.types.v1 import kv_pb2

from services.kvtransfer.books import Stats
from services.kvtransfer.convert import identifier, to_address, to_claim, to_layout, to_part, to_range, token
from services.kvtransfer.errors import InvalidPool, PushCancelled
from services.kvtransfer.pool import PoolShape
from services.kvtransfer.push import PushProgress
from services.kvtransfer.pushes import PushOrder
from services.kvtransfer.service import KvTransfer
from services.kvtransfer.transports.base import PEER_VERSION
from services.kvtransfer.watch import GrantBatch
from services.protocol.errors import LayoutMismatch
from services.protocol.grants import GrantKey, GrantSpec, PoolPages
from services.protocol.ranges import RangeSet
from services.rpc.timing_messages import duration_message

# A string: generic in the stubs only.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class KvTransferServicer(pb_grpc.KvTransferServiceServicer):
    """Translates, and nothing else."""

    def __init__(self, service: KvTransfer) -> None:
        self._service = service

    async def CreatePool(self, request: pb.CreatePoolRequest, context: Context) -> pb.CreatePoolResponse:
        try:
            layout = to_layout(request.layout)
            part = to_part(layout, request.part if request.HasField("part") else None)
            gpu = token(request.gpu, "gpu") if request.gpu else b""
            shape = PoolShape(layout, request.page_count, part, gpu)
        except LayoutMismatch as error:
            raise InvalidPool(error.message) from None
        pool = await self._service.create_pool(request.engine_name, shape, adopt=request.adopt)
        return pb.CreatePoolResponse(pool_id=pool.id, epoch=self._service.epoch, size_bytes=shape.size_bytes)

    async def AttachPool(self, request: pb.AttachPoolRequest, context: Context) -> pb.AttachPoolResponse:
        incarnation = token(request.incarnation, "incarnation")
        attachment = await self._service.attach_pool(request.pool_id, incarnation)
        return pb.AttachPoolResponse(
            socket_path=attachment.socket_path,
            ticket=attachment.ticket,
            endpoint=attachment.endpoint,
            ready_slot_count=attachment.ready_slot_count,
        )

    async def Grant(self, request: pb.GrantRequest, context: Context) -> pb.GrantResponse:
        spec = GrantSpec(
            GrantKey(request.pool_id, identifier(request.reservation_id, "reservation_id")),
            token(request.secret, "secret"),
            to_range(request.window),
            tuple(request.page_ids),
            tuple(PoolPages(pool.pool_id, tuple(pool.page_ids)) for pool in request.other_pools),
        )
        self._service.grant(request.incarnation, spec)
        return pb.GrantResponse()

    async def Revoke(self, request: pb.RevokeRequest, context: Context) -> pb.RevokeResponse:
        committed = await self._service.revoke(
            request.incarnation, GrantKey(request.pool_id, identifier(request.reservation_id, "reservation_id"))
        )
        return pb.RevokeResponse(committed=_ranges(committed))

    async def Push(self, request: pb.PushRequest, context: Context) -> AsyncGenerator[pb.PushResponse, None]:
        order = PushOrder(
            request.pool_id,
            request.incarnation,
            tuple(request.page_ids),
            to_range(request.range),
            to_address(request.target),
            to_claim(request.attempt_range, request.attempt, request.writer_id),
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
        claim = to_claim(request.attempt_range, request.attempt, request.writer_id)
        address = to_address(request.target)
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


def _progress(progress: PushProgress) -> pb.PushResponse:
    return pb.PushResponse(
        state=pb.PushState.Value(f"PUSH_STATE_{progress.state.value}"),
        layers_done=progress.layers_done,
        bytes=progress.num_bytes,
        transport=progress.transport,
        exposed=duration_message(progress.exposed_s) if progress.state.last else None,
    )


def _batch(batch: GrantBatch) -> pb.WatchGrantsResponse:
    events = [
        pb.GrantEvent(
            reservation_id=status.key.reservation_id,
            state=pb.GrantState.Value(f"GRANT_STATE_{status.state.value}"),
            committed=_ranges(status.committed),
            bytes=status.bytes,
        )
        for status in batch.events
    ]
    return pb.WatchGrantsResponse(events=events, snapshot=batch.snapshot)


def _ranges(ranges: RangeSet) -> list[kv_pb2.TokenRange]:
    return [kv_pb2.TokenRange(begin=each.begin, end=each.end) for each in ranges]


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
            busy=duration_message(counters.busy_s),
            note=counters.note,
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
