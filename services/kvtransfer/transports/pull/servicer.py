"""KvPeerService over gRPC."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc.aio
from microserve.kvtransfer.v1 import peer_pb2 as pb
from microserve.kvtransfer.v1 import peer_pb2_grpc as pb_grpc

from services.kvtransfer.convert import to_address, to_claim, to_layout, to_range
from services.kvtransfer.errors import InvalidRequest
from services.kvtransfer.transports.pull.fetching import Fetch, SourcePool
from services.kvtransfer.transports.pull.probing import PullProbes
from services.kvtransfer.transports.pull.puller import PullState
from services.kvtransfer.transports.pull.session import (
    Answer,
    Checksums,
    Finished,
    Last,
    Opened,
    PullOpen,
    PullSessions,
    Ready,
    Said,
)
from services.rpc.kv_messages import range_message

# A string: generic in the stubs only.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class KvPeerServicer(pb_grpc.KvPeerServiceServicer):
    """Translates, and nothing else."""

    def __init__(self, sessions: PullSessions, probes: PullProbes) -> None:
        self._sessions = sessions
        self._probes = probes

    async def Pull(
        self, requests: AsyncIterator[pb.PullRequest], context: Context
    ) -> AsyncGenerator[pb.PullResponse, None]:
        first = await anext(requests, None)
        if first is None or not first.HasField("open"):
            raise InvalidRequest("a pull begins with `open`")
        async with aclosing(self._sessions.serve(_opening(first.open), _said(requests))) as answers:
            async for answer in answers:
                yield _response(answer)

    async def EndPull(self, request: pb.EndPullRequest, context: Context) -> pb.EndPullResponse:
        claim = to_claim(request.attempt_range, request.attempt, request.writer_id)
        return pb.EndPullResponse(committed=await self._sessions.end(to_address(request.target), claim))

    async def ProbePull(self, request: pb.ProbePullRequest, context: Context) -> pb.ProbePullResponse:
        num_bytes, elapsed_s = await self._probes.serve(request.transport, request.offer)
        return pb.ProbePullResponse(bytes=num_bytes, elapsed_us=max(1, round(elapsed_s * 1e6)))


def _opening(message: pb.PullOpen) -> PullOpen:
    return PullOpen(
        to_address(message.target),
        to_claim(message.attempt_range, message.attempt, message.writer_id),
        to_range(message.range),
        SourcePool(to_layout(message.source_layout), message.source_page_count, message.offer),
        tuple(message.source_page_ids),
        message.transport,
        message.checksums,
    )


async def _said(requests: AsyncIterator[pb.PullRequest]) -> AsyncGenerator[Said, None]:
    async for request in requests:
        match request.WhichOneof("kind"):
            case "ready":
                yield Ready(request.ready.layer_end)
            case "checksums":
                yield Checksums(tuple(request.checksums.layers))
            case "finish":
                yield Last.FINISH
            case "leave":
                yield Last.LEAVE
            case _:
                raise InvalidRequest("a pull goes on with `ready`, `checksums`, `finish` or `leave`")


def _response(answer: Answer) -> pb.PullResponse:
    match answer:
        case Opened():
            return pb.PullResponse(opened=pb.PullOpened(committed=answer.committed, checksums=answer.checksums))
        case Fetch():
            return pb.PullResponse(fetch=pb.PullFetch(layer=answer.layer, range=range_message(answer.part)))
        case Finished():
            return pb.PullResponse(finished=pb.PullFinished(committed=answer.committed))
        case PullState():
            progress = pb.PullProgress(
                layers_done=answer.layers_done, bytes=answer.num_bytes, busy_us=round(answer.busy_s * 1e6)
            )
            return pb.PullResponse(progress=progress)
