"""The three verbs by hand, each a call of its own."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import grpc.aio
from microserve.engine.v1 import engine_pb2 as pb
from microserve.engine.v1 import engine_pb2_grpc
from microserve.types.v1 import kv_pb2, sampling_pb2

OWNER = "kv-bench"
TIMEOUT_S = 120.0
_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Verbs:
    """Calls of one engine."""

    stub: engine_pb2_grpc.EngineServiceAsyncStub

    @classmethod
    def on(cls, channel: grpc.aio.Channel) -> Verbs:
        """An engine's."""
        return cls(engine_pb2_grpc.EngineServiceStub(channel))

    async def prep_recv(self, prompt: Sequence[int], end: int, salt: str) -> tuple[str, pb.PrepRecvResponse]:
        """The request id, by which it can be aborted, and the answer."""
        request_id = f"prep-{next(_numbers)}"
        request = pb.PrepRecvRequest(
            owner_id=OWNER, request_id=request_id, prompt_token_ids=prompt, end=end, cache_salt=salt
        )
        return request_id, await self.stub.PrepRecv(request, timeout=TIMEOUT_S)

    async def remote_send(self, prompt: Sequence[int], address: kv_pb2.KvAddress, salt: str) -> pb.RemoteSendResponse:
        """Everything that the address wants."""
        request = pb.RemoteSendRequest(
            owner_id=OWNER,
            request_id=f"send-{next(_numbers)}",
            prompt_token_ids=prompt,
            range=address.window,
            address=address,
            cache_salt=salt,
        )
        return await self.stub.RemoteSend(request, timeout=TIMEOUT_S)

    async def generate_one(self, prompt: Sequence[int], salt: str, address: kv_pb2.KvAddress | None = None) -> None:
        """One token, to the end of the stream."""
        request = pb.StartGenerateRequest(
            owner_id=OWNER,
            request_id=f"start-{next(_numbers)}",
            prompt_token_ids=prompt,
            begin=address.window.end if address is not None else 0,
            sampling=sampling_pb2.SamplingParams(max_tokens=1, ignore_eos=True),
            cache_salt=salt,
        )
        if address is not None:
            request.reservation.reservation_id = address.reservation_id
            request.reservation.secret = address.secret
        async for _ in self.stub.StartGenerate(request, timeout=TIMEOUT_S):
            pass

    async def abort(self, request_id: str) -> None:
        """Gives a reservation up."""
        await self.stub.Abort(pb.AbortRequest(owner_id=OWNER, request_id=request_id), timeout=TIMEOUT_S)
