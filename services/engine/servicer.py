"""EngineService: each rpc in a few lines. What they mean stands in protos/microserve/engine/v1/engine.proto."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import grpc.aio
from microserve.engine.v1 import engine_pb2 as pb
from microserve.engine.v1.engine_pb2_grpc import EngineServiceServicer

from services.engine.convert import from_duration
from services.engine.core import api
from services.engine.errors import BadRequest
from services.engine.front import replies, requests
from services.engine.front.call_log import log_failure, logged
from services.engine.front.calls import within
from services.engine.front.front import Front
from services.engine.front.limits import Limits, shown
from services.engine.front.loads import DEFAULT_INTERVAL_S, MIN_INTERVAL_S
from services.engine.front.session import CancelCall, RefusedStart, RefusedVerb, SessionCommand, converse
from services.engine.front.session_verbs import VerbCall
from services.engine.front.streams import Caller
from services.engine.kvlink.private import no_kvtransfer
from services.engine.metrics import count_verb
from services.protocol.errors import ServiceError
from services.protocol.layout import PageLayout
from services.protocol.timing import Timing
from services.rpc.deadline import earlier, time_left
from services.rpc.kv_messages import layout_message
from services.rpc.timing_messages import duration_message

CONTRACT_VERSION = "1.1"
MAX_TOKENIZER_PIECE_BYTES = 1 << 20
_SERVICE = pb.DESCRIPTOR.services_by_name["EngineService"].full_name

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class EngineIdentity:
    """What GetInfo says and never changes while the process lives."""

    name: str
    incarnation: bytes
    model: str
    model_digest: bytes
    tokenizer_digest: bytes
    layout: PageLayout
    page_count: int
    limits: Limits
    device: str
    labels: dict[str, str]
    eos_token_ids: tuple[int, ...]
    max_batch_size: int
    max_message_bytes: int

    @property
    def shown(self) -> dict[str, str]:
        """What tells engines apart, in words."""
        return {
            "engine": self.name,
            "model": self.model,
            "model_digest": self.model_digest.hex()[:12],
            "device": self.device,
            "page_size": str(self.layout.page_size),
        }


@dataclass(frozen=True, slots=True)
class TransferView:
    """How peers reach this engine's pool."""

    endpoint: str
    transports: tuple[str, ...]


class EngineServicer(EngineServiceServicer):
    """`transfer` says how peers reach the pool now; it is None for an engine with a private pool."""

    def __init__(
        self,
        front: Front,
        identity: EngineIdentity,
        tokenizer_files: tuple[tuple[str, bytes], ...],
        transfer: Callable[[], TransferView] | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._front = front
        self._identity = identity
        self._limits = identity.limits
        self._tokenizer_files = tokenizer_files
        self._transfer = transfer
        self._clock = clock

    async def PrepRecv(self, request: pb.PrepRecvRequest, context: Context) -> pb.PrepRecvResponse:
        return replies.to_reserved(await self._prep_recv(request, context))

    async def RemoteSend(self, request: pb.RemoteSendRequest, context: Context) -> pb.RemoteSendResponse:
        return replies.to_sent(await self._remote_send(request, context))

    async def StartGenerate(
        self, request: pb.StartGenerateRequest, context: Context
    ) -> AsyncIterator[pb.StartGenerateResponse]:
        with self._front.streams.caller() as caller:
            caller.start(self._start_command(request, context))
            async with aclosing(_single(caller)) as outputs:
                async for output in outputs:
                    yield replies.to_generated(output)

    async def Session(
        self, request_iterator: AsyncIterator[pb.SessionRequest], context: Context
    ) -> AsyncIterator[pb.SessionResponse]:
        commands = self._session_commands(request_iterator, context)
        with self._front.streams.caller() as caller:
            async with aclosing(converse(commands, caller)) as portions:
                async for taken in portions:
                    yield replies.to_frame(taken)

    async def Complete(self, request: pb.CompleteRequest, context: Context) -> pb.CompleteResponse:
        response = pb.CompleteResponse()
        with self._front.streams.caller() as caller:
            caller.start(self._start_command(request.start, context))
            async with aclosing(_single(caller)) as outputs:
                async for output in outputs:
                    response.output.MergeFrom(replies.to_generated(output))
        return response

    async def Release(self, request: pb.ReleaseRequest, context: Context) -> pb.ReleaseResponse:
        published = await self._front.calls.ask(requests.to_release(request))
        return pb.ReleaseResponse(published_token_count=published)

    async def Renew(self, request: pb.RenewRequest, context: Context) -> pb.RenewResponse:
        lease_s = await self._front.calls.ask(requests.to_renew(request))
        return pb.RenewResponse(lease=duration_message(lease_s))

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        await self._front.calls.ask(requests.to_abort(request))
        return pb.AbortResponse()

    async def GetInfo(self, request: pb.GetInfoRequest, context: Context) -> pb.GetInfoResponse:
        identity = self._identity
        transfer = self._transfer() if self._transfer else TransferView("", ())
        return pb.GetInfoResponse(
            engine_name=identity.name,
            incarnation=identity.incarnation,
            contract_version=CONTRACT_VERSION,
            model=identity.model,
            model_digest=identity.model_digest,
            tokenizer_digest=identity.tokenizer_digest,
            layout=layout_message(identity.layout),
            page_count=identity.page_count,
            max_context_length=identity.limits.context_limit,
            vocab_size=identity.limits.vocab_size,
            kvtransfer_endpoint=transfer.endpoint,
            transports=transfer.transports,
            device=identity.device,
            labels=identity.labels,
            eos_token_ids=identity.eos_token_ids,
            max_batch_size=identity.max_batch_size,
            max_message_bytes=identity.max_message_bytes,
        )

    async def WatchLoad(self, request: pb.WatchLoadRequest, context: Context) -> AsyncIterator[pb.WatchLoadResponse]:
        interval_s = DEFAULT_INTERVAL_S
        if request.HasField("min_interval"):
            interval_s = from_duration(request.min_interval, "min_interval")
        if interval_s < MIN_INTERVAL_S:
            raise BadRequest(f"min_interval must be at least {MIN_INTERVAL_S:g} seconds, not {interval_s:g}.")
        async with aclosing(self._front.loads.watch(interval_s)) as loads:
            async for load in loads:
                yield replies.to_load(load)

    async def WatchKvEvents(
        self, request: pb.WatchKvEventsRequest, context: Context
    ) -> AsyncIterator[pb.WatchKvEventsResponse]:
        async with aclosing(self._front.cache.watch()) as events:
            async for event in events:
                for message in replies.to_cache_events(event):
                    yield message

    async def ListReservations(
        self, request: pb.ListReservationsRequest, context: Context
    ) -> pb.ListReservationsResponse:
        infos = await self._front.calls.ask(requests.to_list_reservations(request))
        return replies.to_reservation_list(infos)

    async def GetTokenizer(
        self, request: pb.GetTokenizerRequest, context: Context
    ) -> AsyncIterator[pb.GetTokenizerResponse]:
        if request.known_digest == self._identity.tokenizer_digest:
            return
        for name, content in self._tokenizer_files:
            for begin in range(0, max(1, len(content)), MAX_TOKENIZER_PIECE_BYTES):
                piece = content[begin : begin + MAX_TOKENIZER_PIECE_BYTES]
                yield pb.GetTokenizerResponse(file_name=name, data=piece)

    async def _session_commands(
        self, messages: AsyncIterator[pb.SessionRequest], context: Context
    ) -> AsyncGenerator[SessionCommand, None]:
        async for message in messages:
            match message.WhichOneof("command"):
                case "start":
                    try:
                        yield self._start_command(message.start, context)
                    except ServiceError as error:
                        yield RefusedStart(shown(message.start.request_id), error)
                case "prep_recv":
                    yield _verb_call(
                        "PrepRecv", message.prep_recv, partial(self._prep_recv, message.prep_recv, context)
                    )
                case "remote_send":
                    send = partial(self._remote_send, message.remote_send, context)
                    yield _verb_call("RemoteSend", message.remote_send, send)
                case "cancel":
                    yield CancelCall(message.cancel.request_id)

    async def _prep_recv(self, request: pb.PrepRecvRequest, context: Context) -> api.Reserved:
        key = requests.to_key(request.owner_id, request.request_id, request.client_request_id)
        with logged("PrepRecv", key):
            self._require_kvtransfer()
            timeout_s = requests.to_timeout(request)
            ask = requests.to_prep_recv(request, key, self._limits)
            reserved = await within(timeout_s, self._front.calls.ask_for(key, ask))
        count_verb(reserved.timing)
        return reserved

    async def _remote_send(self, request: pb.RemoteSendRequest, context: Context) -> Timing:
        key = requests.to_key(request.owner_id, request.request_id, request.client_request_id)
        with logged("RemoteSend", key):
            self._require_kvtransfer()
            timeout_s = requests.to_timeout(request)
            left_s = earlier(time_left(context), timeout_s)
            ask = requests.to_remote_send(request, key, self._limits, self._at(left_s))
            timing = await self._front.calls.ask_for(key, ask)
        count_verb(timing)
        return timing

    def _start_command(self, request: pb.StartGenerateRequest, context: Context) -> api.StartGenerate:
        try:
            return requests.to_start_generate(request, self._limits, self._clock(), self._at(time_left(context)))
        except ServiceError as error:
            names = (request.owner_id, request.request_id, request.client_request_id)
            log_failure("StartGenerate", api.RequestKey(*map(shown, names)), error)
            raise

    def _at(self, left_s: float | None) -> float | None:
        """What is left of a call's time as a deadline on the engine's clock."""
        return None if left_s is None else self._clock() + left_s

    def _require_kvtransfer(self) -> None:
        if self._transfer is None:
            raise no_kvtransfer()


def _verb_call(
    name: str,
    request: pb.PrepRecvRequest | pb.RemoteSendRequest,
    run: Callable[[], Coroutine[Any, Any, api.Reserved | Timing]],
) -> VerbCall | RefusedVerb:
    method = f"/{_SERVICE}/{name}"
    try:
        return VerbCall(requests.to_key(request.owner_id, request.request_id), method, run)
    except ServiceError as error:
        return RefusedVerb(shown(request.request_id), method, error)


async def _single(caller: Caller) -> AsyncGenerator[api.SequenceOutput, None]:
    """The outputs of a caller's only sequence, to its end. Raises what the sequence failed with."""
    while True:
        for output in (await caller.take()).outputs:
            if output.error is None or output.has_news:
                yield output
            if output.error is not None:
                raise output.error
            if output.finish_reason is not None:
                return
