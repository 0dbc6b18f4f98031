"""Calls of one engine. Nothing else in the router knows the engine's contract."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, TypeVar

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from microserve.engine.v1 import engine_pb2, engine_pb2_grpc
from microserve.types.v1 import kv_pb2

from services.protocol.ranges import TokenRange
from services.protocol.timing import Timing
from services.router.cleanup import Cleanup
from services.router.errors import IncompatibleEngine
from services.router.fleet.cached_blocks import KvEvent
from services.router.fleet.info import EngineInfo, Load, WorkDone
from services.router.fleet.port import ReservedKv
from services.router.fleet.reservation import CALL_TIMEOUT_S
from services.router.fleet.session import Sequence, Session
from services.router.request import ModelKey, PolicyRequest
from services.router.wire import write_sampling
from services.rpc.channel import MAX_MESSAGE_BYTES
from services.rpc.kv_messages import range_message
from services.rpc.status import remote_errors
from services.rpc.timing_messages import duration_message, seconds_of, set_duration, timing_of

SERVICE_NAME = "microserve.engine.v1.EngineService"
CONTRACT_MAJOR = "1"
SESSION_VERBS_MINOR = 1
INFO_TIMEOUT_S = 5.0
TOKENIZER_TIMEOUT_S = 60.0

Message = TypeVar("Message")


class EngineClient:
    """One engine at one address. Errors of the engine are raised as RemoteError with the engine's own code.

    Cancelling a call cancels it on the engine; prep_recv may then leave a reservation behind, which abort ends. The
    verbs go over one session; prep_recv and remote_send as calls of their own before get_info has said that the engine
    takes them there.
    """

    def __init__(
        self,
        address: str,
        channel: grpc.aio.Channel,
        owner_id: str,
        *,
        max_buffered: int,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        """`max_message_bytes` is the channel's limit."""
        self._max_message_bytes = max_message_bytes
        self._owner_id = owner_id
        self._channel = channel
        self._stub = engine_pb2_grpc.EngineServiceStub(channel)
        self._health: Any = health_pb2_grpc.HealthStub(channel)  # its stubs do not know its methods
        self._session_has_all_verbs = False  # until it is known
        self._cleanup = Cleanup(CALL_TIMEOUT_S)
        self._session = Session(
            address,
            self._stub.Session,
            self._abort_unheard,
            max_buffered=max_buffered,
            max_message_bytes=max_message_bytes,
        )

    async def close(self) -> None:
        """Ends every call and sequence."""
        await self._session.close()
        await self._cleanup.drain()
        await self._channel.close()

    async def prep_recv(self, call_id: str, request: PolicyRequest, end: int, max_wait_s: float) -> ReservedKv:
        """Reserves room for KV of prompt[:end]; waits for pages at most `max_wait_s`, zero: not at all."""
        message = engine_pb2.PrepRecvRequest(
            owner_id=self._owner_id,
            request_id=call_id,
            client_request_id=request.request_id,
            prompt_token_ids=request.prompt,
            end=end,
            cache_salt=request.cache_salt,
            max_wait=duration_message(max_wait_s) if max_wait_s > 0 else None,
        )
        left_s = request.time_left_s()
        if self._session_has_all_verbs:
            reply = await self._session.prep_recv(message, left_s)
        else:
            with remote_errors():
                reply = await self._stub.PrepRecv(message, timeout=left_s)
        return ReservedKv(
            reservation_id=reply.address.reservation_id,
            secret=reply.address.secret,
            address=reply.address.SerializeToString(),
            window=TokenRange(reply.matched_token_count, end),
            lease_s=seconds_of(reply.lease),
            timing=timing_of(reply.timing),
        )

    async def remote_send(
        self, call_id: str, request: PolicyRequest, tokens: TokenRange, kv: ReservedKv, attempt: int
    ) -> Timing:
        """Has the engine write KV of `tokens` into a peer's reservation; returns when it is committed there."""
        message = engine_pb2.RemoteSendRequest(
            owner_id=self._owner_id,
            request_id=call_id,
            client_request_id=request.request_id,
            prompt_token_ids=request.prompt,
            range=range_message(tokens),
            address=kv_pb2.KvAddress.FromString(kv.address),
            attempt=attempt,
            cache_salt=request.cache_salt,
            prompt_token_count=len(request.prompt) - request.num_generated,
        )
        left_s = request.time_left_s()
        if self._session_has_all_verbs:
            reply = await self._session.remote_send(message, left_s)
        else:
            with remote_errors():
                reply = await self._stub.RemoteSend(message, timeout=left_s)
        return timing_of(reply.timing)

    def start_generate(self, call_id: str, request: PolicyRequest, begin: int, kv: ReservedKv | None) -> Sequence:
        """Begins a sequence over the session."""
        command = engine_pb2.SessionRequest()
        message = command.start
        message.owner_id = self._owner_id
        message.request_id = call_id
        message.client_request_id = request.request_id
        message.prompt_token_ids.extend(request.prompt)
        message.begin = begin
        message.prompt_token_count = len(request.prompt) - request.num_generated
        write_sampling(request.sampling, message.sampling)
        if kv is not None:
            message.reservation.CopyFrom(_reference(kv))
        message.cache_salt = request.cache_salt
        set_duration(message.timeout, request.time_left_s())
        if request.sampling.prompt_logprobs is not None:
            message.prompt_logprobs_begin = request.num_told
        return self._session.start(command)

    async def release(self, kv: ReservedKv, *, publish: bool, timeout_s: float) -> None:
        """Ends a reservation; with `publish` what was filled stays cached."""
        message = engine_pb2.ReleaseRequest(reservation=_reference(kv), publish=publish)
        with remote_errors():
            await self._stub.Release(message, timeout=timeout_s)

    async def renew(self, kv: ReservedKv, *, timeout_s: float) -> float:
        """Extends a lease by the engine's default; returns its length from now in seconds."""
        with remote_errors():
            reply = await self._stub.Renew(engine_pb2.RenewRequest(reservation=_reference(kv)), timeout=timeout_s)
        return seconds_of(reply.lease)

    async def abort(self, call_id: str, *, timeout_s: float) -> None:
        """Ends whatever the call of that id left on the engine."""
        message = engine_pb2.AbortRequest(owner_id=self._owner_id, request_id=call_id)
        with remote_errors():
            await self._stub.Abort(message, timeout=timeout_s)

    def _abort_unheard(self, call_id: str) -> None:
        """Ends a reservation whose asker left before it was told, and whose abort may have come before it was made."""
        self._cleanup.spawn("abort", self.abort(call_id, timeout_s=CALL_TIMEOUT_S))

    async def get_info(self) -> EngineInfo:
        """IncompatibleEngine if it speaks another major version of the contract."""
        with remote_errors():
            info = await self._stub.GetInfo(engine_pb2.GetInfoRequest(), timeout=INFO_TIMEOUT_S)
        major, _, minor = info.contract_version.partition(".")
        # An engine of contract 1.0 would not answer other verbs on a session.
        self._session_has_all_verbs = minor.isdecimal() and int(minor) >= SESSION_VERBS_MINOR
        self._session.max_message_bytes = min(
            self._max_message_bytes, info.max_message_bytes or self._max_message_bytes
        )
        if major != CONTRACT_MAJOR:
            raise IncompatibleEngine(f"the engine speaks contract {info.contract_version}, not {CONTRACT_MAJOR}.x")
        return EngineInfo(
            name=info.engine_name,
            incarnation=info.incarnation,
            contract_version=info.contract_version,
            model=ModelKey(info.model, info.model_digest, info.tokenizer_digest),
            page_size=info.layout.page_size,
            max_context=info.max_context_length,
            vocab_size=info.vocab_size,
            max_batch_size=info.max_batch_size,
            can_transfer=bool(info.kvtransfer_endpoint),
            labels=dict(info.labels),
            raw=info.SerializeToString(),
        )

    async def watch_health(self) -> AsyncGenerator[bool, None]:
        """Whether the engine serves: at once, then at every change. A channel that cannot connect raises."""
        call = self._health.Watch(health_pb2.HealthCheckRequest(service=SERVICE_NAME))
        async with aclosing(_stream(call)) as replies:
            async for reply in replies:
                yield reply.status == health_pb2.HealthCheckResponse.SERVING

    async def watch_load(self) -> AsyncGenerator[Load, None]:
        """Load reports as the engine sends them."""
        call = self._stub.WatchLoad(engine_pb2.WatchLoadRequest())
        async with aclosing(_stream(call)) as reports:
            async for report in reports:
                yield Load(
                    running=report.running_sequence_count,
                    waiting=report.waiting_sequence_count,
                    waiting_for_kv=report.waiting_for_kv_count,
                    queued_tokens=report.queued_token_count,
                    context_tokens=report.context_token_count,
                    usable_pages=report.pages.free + report.pages.cached,
                    draining=report.draining,
                    work=WorkDone(
                        busy_s=seconds_of(report.work.busy),
                        steps=report.step_count,
                        prompt_tokens=report.work.prompt_token_count,
                        prompt_context=report.work.prompt_context_token_count,
                        rows=report.work.row_count,
                        row_context=report.work.row_context_token_count,
                    ),
                    raw=report.SerializeToString(),
                )

    async def watch_kv_events(self) -> AsyncGenerator[KvEvent, None]:
        """Cache events: a snapshot first."""
        call = self._stub.WatchKvEvents(engine_pb2.WatchKvEventsRequest())
        async with aclosing(_stream(call)) as events:
            async for event in events:
                yield KvEvent(
                    sequence=event.sequence,
                    snapshot=event.snapshot,
                    snapshot_complete=event.snapshot_complete,
                    stored=tuple(block.value for block in event.stored),
                    removed=tuple(block.value for block in event.removed),
                )

    async def download_tokenizer(self) -> AsyncGenerator[tuple[str, bytes], None]:
        """The tokenizer's files: (name, next bytes of that file)."""
        call = self._stub.GetTokenizer(engine_pb2.GetTokenizerRequest(), timeout=TOKENIZER_TIMEOUT_S)
        async with aclosing(_stream(call)) as pieces:
            async for piece in pieces:
                yield piece.file_name, piece.data


async def _stream(call: grpc.aio.UnaryStreamCall[Any, Message]) -> AsyncGenerator[Message, None]:
    """The call's messages. Leaving a loop over a call does not cancel it, so that is done here."""
    try:
        with remote_errors():
            async for message in call:
                yield message
    finally:
        call.cancel()


def _reference(kv: ReservedKv) -> engine_pb2.ReservationRef:
    return engine_pb2.ReservationRef(reservation_id=kv.reservation_id, secret=kv.secret)
