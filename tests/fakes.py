"""An engine without a model: the verbs' contract in memory, over real gRPC.

Tokens are a function of the tokens before them, so every policy must give the same ones. A verb can be told to fail
or to hang; `idle()` waits until nothing is held, and fails if something is for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Any

from microserve.engine.v1 import engine_pb2 as pb
from microserve.engine.v1.engine_pb2_grpc import add_EngineServiceServicer_to_server
from microserve.types.v1 import kv_pb2, sampling_pb2

from services.protocol.errors import Code, ModelMismatch, PromptMismatch, ReservationGone, ServiceError
from services.protocol.hashes import prompt_digest
from services.protocol.ranges import TokenRange
from services.rpc.server import Server, ServerConfig
from services.rpc.status import to_error_message
from tests.fake_description import FakeDescription, Fault
from tests.fake_kv import FakeReservation
from tests.fake_model import FakeModel

__all__ = ["FakeBug", "FakeEngine", "FakeError", "FakeLoss", "FakeModel", "Fault"]

SERVICE = "microserve.engine.v1.EngineService"
BYTES_PER_TOKEN = 64
TOLD_AT_ONCE = 10  # tokens of a prompt
PATIENCE_S = 60.0


class FakeError(ServiceError):
    """What a faulty verb answers."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "NO_PAGES"


class FakeLoss(ServiceError):
    """What becomes of a call whose reply is lost."""

    code = Code.UNAVAILABLE
    reason = "UNAVAILABLE"


class FakeBug(ServiceError):
    """What no retry mends."""

    code = Code.INTERNAL
    reason = "INTERNAL"


class FakeEngine(FakeDescription):
    """One engine, to be started. `peers` finds the others by the address that stands in a KvAddress."""

    def cancel_sequences(self) -> None:
        """As an engine does it that is told to stop and whose grace is over."""
        for task in self.running.values():
            task.cancel()

    async def start(self, listen: str = "127.0.0.1:0", **options: Any) -> str:
        self.server = Server(ServerConfig(listen=listen, metrics_port=None, **options), "engine")
        add_EngineServiceServicer_to_server(self, self.server.grpc)
        self.address = await self.server.start()
        self.peers[self.address] = self
        await self.server.set_serving(SERVICE, True)
        return self.address

    async def stop(self) -> None:
        """As a kill does it: every stream breaks."""
        self.kv.close()
        await self.server.stop(0)

    async def idle(self) -> None:
        """Waits until no reservation, send or sequence is left. AssertionError names what is."""
        try:
            await self.until(lambda: not self.held())
        except TimeoutError:
            raise AssertionError(f"engine {self.name} still holds {self.held()}") from None

    async def until(self, condition: Callable[[], object]) -> None:
        """Waits for a change of what the engine holds that makes it true. TimeoutError."""
        changed = self._subscribe()
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not condition():
                    await changed.wait()
                    changed.clear()
        finally:
            self._changes.discard(changed)

    def held(self) -> list[str]:
        sends = [f"{self.num_sends} sends"] if self.num_sends else []
        return [each.reservation_id for each in self.kv.live] + sorted(self.sequences) + sends

    def called(self, method: str) -> list[Any]:
        """The requests of a method, in order."""
        return [request for name, request in self.calls if name == method]

    # The verbs.

    async def PrepRecv(self, request: pb.PrepRecvRequest, context: Any) -> pb.PrepRecvResponse:
        await self._enter("PrepRecv", request)
        prompt = tuple(request.prompt_token_ids)
        made = self.kv.reserve(request.owner_id, request.request_id, prompt, request.end, request.cache_salt)
        await self._fault("PrepRecv", late=True)
        response = pb.PrepRecvResponse(address=self._address(made), matched_token_count=made.window.begin)
        response.lease.FromNanoseconds(int(self.kv.lease_s * 1e9))
        response.timing.matched_token_count = made.window.begin
        return response

    async def RemoteSend(self, request: pb.RemoteSendRequest, context: Any) -> pb.RemoteSendResponse:
        address, prompt = request.address, tuple(request.prompt_token_ids)
        tokens, attempt = TokenRange(request.range.begin, request.range.end), request.attempt or 1
        receiver = self.peers[address.endpoint]
        if address.model_digest != self.model.digest:
            raise ModelMismatch("the receiver runs another model")
        if address.prompt_digest != prompt_digest(prompt[: address.window.end], request.cache_salt):
            raise PromptMismatch("the receiver was given another prompt")
        reservation = receiver.kv.find(address.reservation_id, address.secret)
        receiver.kv.begin_attempt(reservation, tokens, attempt)
        self.num_sends += 1
        try:
            await self._enter("RemoteSend", request)
            matched = self.kv.matched(prompt[: tokens.end], request.cache_salt)
            self.kv.publish(prompt[: tokens.end], request.cache_salt)
            receiver.kv.commit(reservation, tokens, attempt)
            await self._fault("RemoteSend", late=True)
        finally:
            self.num_sends -= 1
            self._notify()
        timing = sampling_pb2.Timing(matched_token_count=matched, computed_token_count=tokens.end - matched)
        timing.transferred_token_count, timing.transferred_bytes = len(tokens), len(tokens) * BYTES_PER_TOKEN
        return pb.RemoteSendResponse(timing=timing)

    async def StartGenerate(
        self, request: pb.StartGenerateRequest, context: Any
    ) -> AsyncIterator[pb.StartGenerateResponse]:
        async for response in self._generate(request):
            yield response

    async def Session(self, requests: Any, context: Any) -> AsyncIterator[pb.SessionResponse]:
        outputs: asyncio.Queue[pb.SequenceOutput | pb.VerbAnswer | None] = asyncio.Queue()
        running = self.running

        async def read() -> None:
            async for command in requests:
                if command.HasField("start"):
                    self.calls.append(("Session", command.start))
                    task = asyncio.create_task(self._sequence(command.start, outputs))
                    running[command.start.request_id] = task
                elif (verb := command.WhichOneof("command")) != "cancel":
                    request = getattr(command, verb)
                    self.calls.append(("SessionVerb", request))
                    running[request.request_id] = asyncio.create_task(self._answer(verb, request, context, outputs))
                elif command.cancel.request_id in running:
                    self.calls.append(("Cancel", command.cancel))
                    running[command.cancel.request_id].cancel()
            outputs.put_nowait(None)

        reader = asyncio.create_task(read())
        try:
            while (output := await outputs.get()) is not None:
                if isinstance(output, pb.SequenceOutput):
                    yield pb.SessionResponse(outputs=[output])
                else:
                    yield pb.SessionResponse(answers=[output])
        finally:
            for task in (reader, *running.values()):
                task.cancel()
            await asyncio.wait({reader, *running.values()})

    async def Release(self, request: pb.ReleaseRequest, context: Any) -> pb.ReleaseResponse:
        await self._enter("Release", request)
        with suppress(ReservationGone):  # idempotent
            reference = request.reservation
            self.kv.end(self.kv.find(reference.reservation_id, reference.secret), "released")
        return pb.ReleaseResponse()

    async def Renew(self, request: pb.RenewRequest, context: Any) -> pb.RenewResponse:
        await self._enter("Renew", request)
        self.kv.renew(self.kv.find(request.reservation.reservation_id, request.reservation.secret))
        response = pb.RenewResponse()
        response.lease.FromNanoseconds(int(self.kv.lease_s * 1e9))
        return response

    async def Abort(self, request: pb.AbortRequest, context: Any) -> pb.AbortResponse:
        await self._enter("Abort", request)
        for each in self.kv.live:
            if (each.owner_id, each.request_id) == (request.owner_id, request.request_id):
                self.kv.end(each, "aborted")
        return pb.AbortResponse()

    async def _answer(self, verb: str, request: Any, context: Any, outputs: asyncio.Queue[Any]) -> None:
        """One other verb of a session."""
        handler = self.PrepRecv if verb == "prep_recv" else self.RemoteSend
        answer = pb.VerbAnswer(request_id=request.request_id)
        try:
            getattr(answer, verb).CopyFrom(await handler(request, context))
        except ServiceError as error:
            answer.error.CopyFrom(to_error_message(error))
        outputs.put_nowait(answer)

    async def _sequence(self, request: pb.StartGenerateRequest, outputs: asyncio.Queue[Any]) -> None:
        """One sequence of a session."""

        def put(**fields: Any) -> None:
            outputs.put_nowait(pb.SequenceOutput(request_id=request.request_id, **fields))

        try:
            async for response in self._generate(request):
                put(output=response)
        except ServiceError as error:
            put(error=to_error_message(error))
        except asyncio.CancelledError:
            cancelled = pb.StartGenerateResponse(finish_reason=sampling_pb2.FINISH_REASON_CANCELLED)
            cancelled.timing.computed_token_count = len(request.prompt_token_ids) - request.begin
            put(output=cancelled)

    async def _generate(self, request: pb.StartGenerateRequest) -> AsyncIterator[pb.StartGenerateResponse]:
        self.calls.append(("StartGenerate", request))
        reservation = None
        self.sequences.add(request.request_id)
        self._notify()
        try:
            if request.HasField("reservation"):
                reservation = self.kv.find(request.reservation.reservation_id, request.reservation.secret)
                await _filled(reservation)
                reservation.attached = True
            elif request.begin:
                raise FakeError("begin without a reservation")
            async for response in self._tokens(request, reservation):
                yield response
        finally:
            self.sequences.discard(request.request_id)
            if reservation is not None and reservation.attached:
                self.kv.end(reservation, "used up")
            self._notify()

    async def _tokens(
        self, request: pb.StartGenerateRequest, reservation: FakeReservation | None
    ) -> AsyncIterator[pb.StartGenerateResponse]:
        tokens, sampling = list(request.prompt_token_ids), request.sampling
        num_given, num_prompt = len(tokens), request.prompt_token_count or len(tokens)
        moved = len(reservation.window) if reservation is not None else 0
        here = reservation.window.end if reservation else self.kv.matched(tokens[:-1], request.cache_salt)
        fault = self.faults.get("StartGenerate") or Fault()
        if not fault.after_tokens and not fault.after_told:
            await self._fault("StartGenerate")
        if sampling.HasField("prompt_logprobs"):
            begin = max(1, request.prompt_logprobs_begin)
            here = min(here, begin - 1) if begin < num_prompt else here
            for first in range(begin, num_prompt, TOLD_AT_ONCE):
                told = range(first, min(first + TOLD_AT_ONCE, num_prompt))
                yield pb.StartGenerateResponse(prompt_logprobs=self._rate(tokens, told, sampling.prompt_logprobs))
                if fault.after_told and first + TOLD_AT_ONCE > fault.after_told:
                    await self._fault("StartGenerate")
        limit = min(sampling.max_tokens or self.model.max_context, self.model.max_context - num_prompt)
        finish, untold = sampling_pb2.FINISH_REASON_LENGTH, list[int]()
        for produced in range(1, limit - (num_given - num_prompt) + 1):
            await asyncio.sleep(0)  # a step: others get their turn
            await self.gate.wait()
            token = self.model.next_token(tokens, num_prompt, sampling)
            if token is None:
                finish = sampling_pb2.FINISH_REASON_STOP
                break
            tokens.append(token)
            untold.append(token)
            if len(untold) == self.tokens_at_once:
                yield _piece(untold, with_logprobs=sampling.HasField("logprobs"))
                untold.clear()
            if (self.faults.get("StartGenerate") or Fault()).after_tokens == produced:
                await self._fault("StartGenerate")
        if untold:
            yield _piece(untold, with_logprobs=sampling.HasField("logprobs"))
        self.kv.publish(tokens, request.cache_salt)
        timing = sampling_pb2.Timing(
            matched_token_count=here - moved,
            transferred_token_count=moved,
            computed_token_count=num_given - here,
            generated_token_count=len(tokens) - num_given,
        )
        yield pb.StartGenerateResponse(finish_reason=finish, timing=timing)

    def _rate(self, tokens: list[int], told: range, num_top: int) -> sampling_pb2.PromptLogprobs:
        """The best one in every place is what stands there, then come its successors."""
        rated = sampling_pb2.PromptLogprobs(top_count=num_top)
        for position in told:
            logprob = self.model.rate(tokens, position)
            rated.logprobs.append(logprob)
            rated.top_token_ids.extend((tokens[position] + rank) % self.model.vocab_size for rank in range(num_top))
            rated.top_logprobs.extend(logprob - rank for rank in range(num_top))
        return rated

    def _address(self, made: FakeReservation) -> kv_pb2.KvAddress:
        return kv_pb2.KvAddress(
            reservation_id=made.reservation_id,
            endpoint=self.address,
            epoch=self.incarnation,
            secret=made.secret,
            window=kv_pb2.TokenRange(begin=made.window.begin, end=made.window.end),
            model_digest=self.model.digest,
            prompt_digest=prompt_digest(made.prompt[: made.window.end], made.salt),
        )


async def _filled(reservation: FakeReservation) -> None:
    while not reservation.filled:
        if reservation.over:
            raise ReservationGone(f"the reservation was {reservation.over}")
        reservation.changed.clear()
        await reservation.changed.wait()


def _piece(tokens: Sequence[int], *, with_logprobs: bool) -> pb.StartGenerateResponse:
    response = pb.StartGenerateResponse(token_ids=tokens)
    for token in tokens if with_logprobs else ():
        response.logprobs.add(chosen=sampling_pb2.TokenLogprob(token_id=token, logprob=-0.5))
    return response
