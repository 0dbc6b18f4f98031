"""The requests of one stream, and what has come of them and is not yet on its way to the client."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

from services.protocol.errors import ServiceError
from services.router.eager import begin
from services.router.errors import InvalidRequest, RequestCancelled
from services.rpc.interceptor import internal_error

# That may wait for a slow client before its requests wait for it: of each one piece more.
MAX_WAITING_BYTES = 1 << 20
# Of a frame, unless one output by itself is larger: far below what a message may hold.
MAX_FRAME_BYTES = 1 << 18
# What a frame adds to one output.
_FRAME_BYTES = 16


class Output(Protocol):
    """A piece of one answer, as a message."""

    @property
    def call_id(self) -> int:
        """The request."""
        ...

    @property
    def last(self) -> bool:
        """Whether it ends the request."""
        ...

    def ByteSize(self) -> int:
        """Of the message."""
        ...


OutputT = TypeVar("OutputT", bound=Output)
# Takes a piece of the answer; False: too much is waiting, so wait_for_room() comes before the next.
Say: TypeAlias = "Callable[[OutputT], bool]"


class Conversation(Generic[OutputT]):
    """Each request is a task of its own, so that none waits for another. Belongs to the running loop."""

    def __init__(self, method: str, failed: Callable[[int, ServiceError], OutputT], *, max_message_bytes: int) -> None:
        """`method` as logs name it; `failed` makes the last output of a request out of its error. A frame of one output
        is at most `max_message_bytes` long."""
        self._method = method
        self._max_output_bytes = max_message_bytes - _FRAME_BYTES
        self._failed = failed
        self._open: dict[int, asyncio.Task[None]] = {}
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[OutputT, int]] = deque()  # with their bytes
        self._waiting_bytes = 0
        self._ended = False
        self._end_error: ServiceError | None = None
        self._taker: asyncio.Future[None] | None = None  # while take() waits
        self.has_room = True  # not too much is waiting for the client
        self._got_room = asyncio.Event()

    def begin(self, call_id: int, answer: Callable[[Say[OutputT]], Coroutine[Any, Any, None]]) -> None:
        """Begins a request at once, whose number must be new; after end() it fails with what ended the conversation."""
        if self._end_error is not None:
            self._fail(call_id, self._end_error)
        else:
            begin(self._answer(call_id, answer), f"{self._method} {call_id}")

    def cancel(self, call_id: int) -> None:
        """Ends a request as if its client had left. One that is not open is ignored."""
        task = self._open.get(call_id)
        if task is not None and not task.cancelling():  # once: what it does then takes its time
            task.cancel()

    def end(self, error: ServiceError | None = None) -> None:
        """No request is begun any more; those that are open go on. The first `error` counts."""
        self._ended = True
        self._end_error = self._end_error or error
        self._wake()

    async def take(self) -> list[OutputT]:
        """What has come since, at least one output and as many as make a frame; empty once all is over. Raises what
        the conversation was ended with."""
        while not self._waiting:
            if self._ended and not self._open:
                if self._end_error is not None:
                    raise self._end_error
                return []
            self._taker = self._loop.create_future()
            try:
                await self._taker
            finally:
                self._taker = None
        taken, num_bytes = list[OutputT](), 0
        while self._waiting:
            output, size = self._waiting[0]
            if taken and num_bytes + size > MAX_FRAME_BYTES:
                break
            self._waiting.popleft()
            taken.append(output)
            num_bytes += size
        self._waiting_bytes -= num_bytes
        if not self.has_room and self._waiting_bytes < MAX_WAITING_BYTES:
            self.has_room = True
            self._got_room.set()
        return taken

    async def wait_for_room(self) -> None:
        """Waits until `has_room`."""
        while not self.has_room:
            self._got_room.clear()
            await self._got_room.wait()

    def cancel_all(self) -> None:
        """Ends every request, and begins no more."""
        self._ended = True
        for task in self._open.values():
            task.cancel()

    async def over(self) -> None:
        """Returns when all that is open now has ended."""
        await asyncio.gather(*self._open.values(), return_exceptions=True)

    async def _answer(self, call_id: int, answer: Callable[[Say[OutputT]], Coroutine[Any, Any, None]]) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open[call_id] = task
        is_over = False
        failure: ServiceError | None = None

        def say(output: OutputT) -> bool:
            nonlocal is_over
            size = output.ByteSize()
            if size > self._max_output_bytes:  # gRPC would end the stream
                raise InvalidRequest(f"a piece of the answer has {size} bytes, more than fit into a message")
            is_over = output.last
            self._put(output, size)
            return self.has_room

        try:
            await answer(say)
        except Exception as error:
            failure = error if isinstance(error, ServiceError) else internal_error(self._method, error)
        except asyncio.CancelledError as error:
            if task.cancelling():
                failure = RequestCancelled("the client cancelled the request")
            else:  # nobody asked for it: somebody cancelled a task that the request was waiting for
                failure = internal_error(self._method, error)
        try:
            if failure is not None and not is_over:
                self._fail(call_id, failure)
        finally:
            del self._open[call_id]
            if self._ended:
                self._wake()

    def _fail(self, call_id: int, error: ServiceError) -> None:
        output = self._failed(call_id, error)
        self._put(output, output.ByteSize())

    def _put(self, output: OutputT, size: int) -> None:
        self._waiting.append((output, size))
        self._waiting_bytes += size
        if self._waiting_bytes >= MAX_WAITING_BYTES:
            self.has_room = False
        if self._taker is not None:
            self._wake()

    def _wake(self) -> None:
        if self._taker is not None and not self._taker.done():
            self._taker.set_result(None)
