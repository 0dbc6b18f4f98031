"""StartGenerate, Session and Complete behind one face, so that one suite can hold them equal."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import grpc.aio
from google.rpc import error_details_pb2, status_pb2
from microserve.engine.v1 import engine_pb2 as pb
from microserve.engine.v1.engine_pb2_grpc import EngineServiceStub
from microserve.types.v1 import error_pb2, sampling_pb2

from services.rpc.status import DETAILS_KEY


@dataclass
class Outcome:
    """Everything that a client learned of one sequence."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[sampling_pb2.Logprobs] = field(default_factory=list)
    prompt_logprobs: sampling_pb2.PromptLogprobs = field(default_factory=sampling_pb2.PromptLogprobs)
    finish_reason: int = 0
    timing: sampling_pb2.Timing | None = None
    error: tuple[int, str, float | None] | None = None  # code, reason, retry delay in seconds
    message: str = ""

    def add(self, response: pb.StartGenerateResponse) -> None:
        self.token_ids += response.token_ids
        self.logprobs += response.logprobs
        self.prompt_logprobs.MergeFrom(response.prompt_logprobs)
        self.finish_reason = self.finish_reason or response.finish_reason
        if response.HasField("timing"):
            self.timing = response.timing

    def fail(self, error: error_pb2.Error) -> None:
        delay = error.retry_delay.ToNanoseconds() / 1e9 if error.HasField("retry_delay") else None
        self.error, self.message = (error.code, error.reason, delay), error.message


class StartGenerateReader:
    """One StartGenerate call a sequence."""

    streams = True

    def __init__(self, stub: EngineServiceStub, request: pb.StartGenerateRequest, timeout: float | None = None) -> None:
        self._call = stub.StartGenerate(request, timeout=timeout)
        self._outcome = Outcome()

    async def read(self) -> Outcome:
        """What is known after one more message."""
        response = await self._call.read()
        if isinstance(response, pb.StartGenerateResponse):
            self._outcome.add(response)
        return self._outcome

    async def result(self) -> Outcome:
        """What is known at the end."""
        try:
            async for response in self._call:
                self._outcome.add(response)
        except grpc.aio.AioRpcError as error:
            self._outcome.fail(_from_call(error))
        return self._outcome

    async def cancel(self) -> None:
        self._call.cancel()


class CompleteReader(StartGenerateReader):
    """One Complete call a sequence."""

    streams = False

    def __init__(self, stub: EngineServiceStub, request: pb.StartGenerateRequest, timeout: float | None = None) -> None:
        self._call = stub.Complete(pb.CompleteRequest(start=request), timeout=timeout)
        self._outcome = Outcome()
        # A unary call begins when it is awaited.
        self._reply = asyncio.ensure_future(self._wait())

    async def _wait(self) -> Outcome:
        try:
            response = await self._call
        except grpc.aio.AioRpcError as error:
            self._outcome.fail(_from_call(error))
        else:
            self._outcome.add(response.output)
        return self._outcome

    async def result(self) -> Outcome:
        return await self._reply


class SessionReader:
    """One sequence on a Session of its own."""

    streams = True

    def __init__(self, stub: EngineServiceStub, request: pb.StartGenerateRequest, timeout: float | None = None) -> None:
        self._call = stub.Session(timeout=timeout)
        self._request = request
        self._outcome = Outcome()
        self._begun = asyncio.ensure_future(self._call.write(pb.SessionRequest(start=request)))

    async def read(self) -> Outcome:
        await self._begun
        frame = await self._call.read()
        for entry in getattr(frame, "outputs", ()):
            assert entry.request_id == self._request.request_id
            if entry.HasField("output"):
                self._outcome.add(entry.output)
            if entry.HasField("error"):
                self._outcome.fail(entry.error)
        return self._outcome

    async def result(self) -> Outcome:
        while not self._outcome.finish_reason and not self._outcome.error:
            await self.read()
        await self._call.done_writing()
        assert await self._call.read() is grpc.aio.EOF, "nothing comes after the end of the last sequence"
        return self._outcome

    async def cancel(self) -> None:
        await self._begun
        cancel = pb.CancelCall(request_id=self._request.request_id)
        await self._call.write(pb.SessionRequest(cancel=cancel))


def _from_call(error: grpc.aio.AioRpcError) -> error_pb2.Error:
    message = error_pb2.Error(code=error.code().value[0], message=error.details() or "")
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
            for detail in status_pb2.Status.FromString(value).details:
                if detail.Unpack(info):
                    message.reason = info.reason
                elif detail.Unpack(retry):
                    message.retry_delay.CopyFrom(retry.retry_delay)
    return message
