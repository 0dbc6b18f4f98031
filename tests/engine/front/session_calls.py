"""PrepRecv and RemoteSend as messages of a session."""

from __future__ import annotations

import grpc
import grpc.aio
from microserve.engine.v1 import engine_pb2 as pb

from services.engine.core import api
from services.protocol.timing import Timing
from tests.engine.front.harness import Served
from tests.engine.front.test_servicer import ADDRESS

RESERVED = api.Reserved(ADDRESS, 4, 2.0, Timing(matched_tokens=4))


def command(request: pb.PrepRecvRequest | pb.RemoteSendRequest) -> pb.SessionRequest:
    if isinstance(request, pb.PrepRecvRequest):
        return pb.SessionRequest(prep_recv=request)
    return pb.SessionRequest(remote_send=request)


async def answer_of(call: grpc.aio.StreamStreamCall) -> pb.VerbAnswer:
    (answer,) = (await call.read()).answers
    return answer


async def by_itself(served: Served, request: pb.PrepRecvRequest | pb.RemoteSendRequest) -> object:
    is_prep = isinstance(request, pb.PrepRecvRequest)
    return await (served.stub.PrepRecv(request) if is_prep else served.stub.RemoteSend(request))
