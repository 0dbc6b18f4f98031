"""One Session stream for all verbs between this router and an engine."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import replace
from typing import Any, TypeAlias

import grpc.aio
from microserve.engine.v1 import engine_pb2

from services.protocol.errors import Code, ServiceError
from services.router.eager import begin
from services.router.errors import EngineLost, InvalidRequest
from services.router.fleet.mailbox import Mailbox
from services.router.values import Chunk, FinishReason
from services.router.wire import chunk_from_wire
from services.rpc.status import RemoteError, from_error_message, from_rpc_error
from services.rpc.timing_messages import duration_message

SessionCall = grpc.aio.StreamStreamCall[engine_pb2.SessionRequest, engine_pb2.SessionResponse]

# Errors are its results: one whose asker has just left must not be taken for an exception that nobody saw.
_Answer: TypeAlias = "asyncio.Future[engine_pb2.VerbAnswer | ServiceError]"


class Sequence:
    """A generation on an engine."""

    def __init__(self, request_id: str, mailbox: Mailbox, send_cancel: Callable[[str], None]) -> None:
        self.request_id = request_id
        self._mailbox = mailbox
        self._send_cancel = send_cancel

    def take(self) -> Coroutine[Any, Any, Chunk | None]:
        """New tokens; the last chunk has `finish`, after it comes None. Raises the sequence's or stream's error.

        Cancelling loses nothing and does not end the sequence.
        """
        return self._mailbox.take()

    def each(self, take: Callable[[Chunk], bool]) -> Coroutine[Any, Any, bool]:
        """Gives `take` every chunk as it comes, see Mailbox.each. Raises as take() does."""
        return self._mailbox.each(take)

    def cancel(self) -> None:
        """Tells the engine to stop, if it has not ended; take() then still gives its last output, which has no account
        if the engine never heard of it. Never blocks."""
        if not self._mailbox.closed:
            self._send_cancel(self.request_id)

    def take_away(self, error: ServiceError) -> None:
        """Ends it at once: take() gives what has come, then raises `error`. The engine is told to stop."""
        if not self._mailbox.closed:
            self._mailbox.close(error)
            self._send_cancel(self.request_id)


class Session:
    """Opens the stream with the first verb, and again after a break, which fails what was open on it."""

    def __init__(
        self,
        engine: str,
        open_call: Callable[[], SessionCall],
        abort: Callable[[str], None],
        *,
        max_buffered: int,
        max_message_bytes: int,
    ) -> None:
        """`abort` is given the request id of a reservation that was made for somebody who has left. `max_message_bytes`
        is the least of what the channel and the engine let through; it may be set again."""
        self._engine = engine
        self._open_call = open_call
        self._abort = abort
        self._max_buffered = max_buffered
        self.max_message_bytes = max_message_bytes
        self._stream: _Stream | None = None

    def start(self, command: engine_pb2.SessionRequest) -> Sequence:
        """Begins the sequence of `command.start`; whether the engine takes it shows in take(). InvalidRequest if it is
        too large to send."""
        return self._open_for(command).start(command, Mailbox(self._max_buffered))

    async def prep_recv(self, request: engine_pb2.PrepRecvRequest, timeout_s: float) -> engine_pb2.PrepRecvResponse:
        """As the call by itself. Cancelling cancels it on the engine."""
        request.timeout.CopyFrom(duration_message(timeout_s))
        command = engine_pb2.SessionRequest(prep_recv=request)
        return (await self._ask(request.request_id, command, timeout_s)).prep_recv

    async def remote_send(
        self, request: engine_pb2.RemoteSendRequest, timeout_s: float
    ) -> engine_pb2.RemoteSendResponse:
        """As the call by itself. Cancelling cancels it on the engine."""
        request.timeout.CopyFrom(duration_message(timeout_s))
        command = engine_pb2.SessionRequest(remote_send=request)
        return (await self._ask(request.request_id, command, timeout_s)).remote_send

    async def close(self) -> None:
        """Ends the stream, and with it every verb."""
        if self._stream is not None:
            await self._stream.close()

    def _open_for(self, command: engine_pb2.SessionRequest) -> _Stream:
        """The stream to put it on. InvalidRequest if it is too large: writing it would end everybody's verbs."""
        if command.ByteSize() > self.max_message_bytes:
            message = f"the request is {command.ByteSize()} bytes to an engine, more than {self.max_message_bytes}"
            raise InvalidRequest(message)
        if self._stream is None or self._stream.ended:
            self._stream = _Stream(self._engine, self._open_call(), self._abort)
        return self._stream

    async def _ask(
        self, request_id: str, command: engine_pb2.SessionRequest, timeout_s: float
    ) -> engine_pb2.VerbAnswer:
        """The answer to a command. Raises the engine's error, EngineLost, InvalidRequest if it is too large to send, or
        DEADLINE_EXCEEDED as a call would: the engine keeps the time too, but may have stopped."""
        stream = self._open_for(command)
        answer = stream.ask(request_id, command)
        timer = asyncio.get_running_loop().call_later(timeout_s, self._time_is_over, answer)
        try:
            found = await answer
        finally:
            timer.cancel()
            stream.leave(request_id)
        if isinstance(found, ServiceError):
            raise found
        return found

    def _time_is_over(self, answer: _Answer) -> None:
        if not answer.done():
            message = f"engine {self._engine} did not answer in time"
            answer.set_result(RemoteError(Code.DEADLINE_EXCEEDED, Code.DEADLINE_EXCEEDED.name, message))


class _Stream:
    """One call of Session: commands are written in order, a reader deals outputs to mailboxes."""

    def __init__(self, engine: str, call: SessionCall, abort: Callable[[str], None]) -> None:
        self.ended = False
        self._engine = engine
        self._call = call
        self._abort = abort
        self._live: dict[str, Mailbox] = {}
        self._asked: dict[str, _Answer] = {}  # verbs that are no sequences
        self._cancelled: set[str] = set()  # of these, the ones that we ended
        # By request id: a verb that somebody waits for, or the cancel of one that the engine has been told of. So what
        # waits for an engine that stands still is bounded by what is open and by what it had been sent before.
        self._outbox: OrderedDict[str, engine_pb2.SessionRequest] = OrderedDict()
        self._writer: asyncio.Task[None] | None = None  # while it writes, or the last one
        self._is_writing = False
        self._reader = asyncio.create_task(self._read(), name=f"session reader {engine}")

    def start(self, command: engine_pb2.SessionRequest, mailbox: Mailbox) -> Sequence:
        request_id = command.start.request_id
        self._live[request_id] = mailbox
        self._post(request_id, command)
        return Sequence(request_id, mailbox, self._cancel)

    def ask(self, request_id: str, command: engine_pb2.SessionRequest) -> _Answer:
        """To be awaited; then leave()."""
        answer = self._asked[request_id] = asyncio.get_running_loop().create_future()
        self._post(request_id, command)
        return answer

    def leave(self, request_id: str) -> None:
        """Nobody waits for the answer any more; if it has not come, the engine is told, unless it never heard of it."""
        if self._asked.pop(request_id, None) is not None and not self._take_back(request_id):
            self._send_cancel(request_id)

    async def close(self) -> None:
        # Here too, because a task that is cancelled before its first step never comes to its finally.
        self._end(EngineLost(f"the session with engine {self._engine} was closed"))
        self._reader.cancel()
        await asyncio.wait([task for task in (self._reader, self._writer) if task is not None])

    def _cancel(self, request_id: str) -> None:
        if request_id not in self._live:
            return
        if self._take_back(request_id):
            mailbox = self._live.pop(request_id)
            mailbox.put(Chunk(finish=FinishReason.CANCELLED))
            mailbox.close()
        else:
            self._cancelled.add(request_id)
            self._send_cancel(request_id)

    def _take_back(self, request_id: str) -> bool:
        """Whether the verb is not written yet; then it never is."""
        command = self._outbox.get(request_id)
        if command is None or command.HasField("cancel"):
            return False
        del self._outbox[request_id]
        return True

    def _send_cancel(self, request_id: str) -> None:
        self._post(request_id, engine_pb2.SessionRequest(cancel=engine_pb2.CancelCall(request_id=request_id)))

    def _post(self, request_id: str, command: engine_pb2.SessionRequest) -> None:
        self._outbox[request_id] = command
        if not self._is_writing:
            self._is_writing = True
            # At once: in the next turn of the loop it would stand behind all that is ready by then.
            self._writer = begin(self._write(), f"session writer {self._engine}")

    async def _write(self) -> None:
        try:
            while self._outbox:
                await self._call.write(self._outbox.popitem(last=False)[1])
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # it says only that the call is over; the reader learns why
        finally:
            self._is_writing = False

    async def _read(self) -> None:
        error = EngineLost(f"engine {self._engine} ended the session")
        try:
            async for frame in self._call:
                for answer in frame.answers:
                    self._settle(answer)
                if frame.outputs:
                    await self._deal(frame.outputs)
        except grpc.aio.AioRpcError as failure:
            # Whatever its code: it is no single verb's error.
            error = EngineLost(f"the session with engine {self._engine} broke: {from_rpc_error(failure).message}")
        finally:
            self._end(error)

    def _end(self, error: ServiceError) -> None:
        """Fails what is open. Only the first counts."""
        if self.ended:
            return
        self.ended = True
        if self._writer is not None:
            self._writer.cancel()
        # Leaving the loop over a call does not cancel it.
        self._call.cancel()
        self._outbox.clear()
        for mailbox in self._live.values():
            mailbox.close(error)
        self._live.clear()
        for asked in self._asked.values():
            if not asked.done():
                asked.set_result(error)
        self._asked.clear()

    def _settle(self, answer: engine_pb2.VerbAnswer) -> None:
        asked = self._asked.pop(answer.request_id, None)
        if asked is not None and not asked.done():
            asked.set_result(from_error_message(answer.error) if answer.HasField("error") else answer)
        elif answer.HasField("prep_recv"):  # whoever asked has left, and the cancel came too late
            self._abort(answer.request_id)

    async def _deal(self, outputs: Iterable[engine_pb2.SequenceOutput]) -> None:
        """A frame has something of each sequence. First tokens, for which somebody has been waiting, are on their way
        to the client before the others are looked at."""
        others, has_first = [], False
        for output in outputs:
            mailbox = self._live.get(output.request_id)
            if mailbox is None or mailbox.has_begun:
                others.append(output)
            else:
                has_first = True
                self._deliver(output)
        if has_first and others:
            await asyncio.sleep(0)
        for output in others:
            self._deliver(output)

    def _deliver(self, output: engine_pb2.SequenceOutput) -> None:
        mailbox = self._live.get(output.request_id)
        if mailbox is None:  # ended or overflowed here while this was under way
            return
        if output.HasField("error"):
            mailbox.close(from_error_message(output.error))
        else:
            chunk = chunk_from_wire(output.output)
            if chunk.finish is FinishReason.CANCELLED and output.request_id not in self._cancelled:
                # Nobody here wanted it: the engine is going away, and what it said so far is not an answer.
                mailbox.put(replace(chunk, finish=None, timing=None))
                mailbox.close(EngineLost(f"engine {self._engine} ended a sequence"))
            else:
                mailbox.put(chunk)
            if chunk.finish is not None:
                mailbox.close()
            elif mailbox.closed:  # overflowed
                self._cancel(output.request_id)
        if mailbox.closed:
            del self._live[output.request_id]
            self._cancelled.discard(output.request_id)
