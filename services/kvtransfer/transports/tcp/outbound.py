"""The sending end of one connection: frames of all its puts in turn, and the answers to its requests."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable

from microserve.kvtransfer.v1 import data_pb2 as pb

from services.kvtransfer.errors import PeerLost, ProtocolViolation
from services.kvtransfer.transports.base import PEER_VERSION
from services.kvtransfer.transports.tcp.channel import Channel
from services.kvtransfer.transports.tcp.connection import Connection
from services.kvtransfer.transports.tcp.wire import Kind, decode_message, encode_message, to_error
from services.protocol.errors import ServiceError

# A revoke that the receiver has to wait for is bounded at five seconds there.
REQUEST_TIMEOUT_S = 10.0
_ZEROS = memoryview(bytes(1 << 18))


class Source:
    """Something with frames to send: a put or a probe. Called on the connection's thread."""

    def next_frame(self) -> list[memoryview]:
        """The next frame; empty if there is none now."""
        raise NotImplementedError

    def sent(self, busy_ns: int) -> None:
        """Sending some of a frame took so long."""

    def landed(self, layer: int, end: int) -> None:
        """All before and with this is in place."""
        raise ProtocolViolation("what was not sent cannot have landed")

    def failed(self, error: ServiceError) -> None:
        """The receiver refused it, or the connection ended."""


class Outbound(Connection):
    """One connection to another service."""

    def __init__(
        self,
        name: str,
        epochs: tuple[bytes, bytes],
        make_channel: Callable[[], Channel],
        on_end: Callable[[Outbound], None],
    ) -> None:
        """`epochs`: ours and the peer's. `make_channel` may block; it raises TransportFailed. `on_end` is called on
        the loop."""
        super().__init__(name)
        self.challenge = b""
        self.lost = False
        self._epochs = epochs
        self._make_channel = make_channel
        self._on_end = on_end
        self._numbers = itertools.count(1)
        self._loop = asyncio.get_running_loop()
        # Of the loop.
        self._waiting: dict[int, asyncio.Future[pb.DataMessage]] = {}
        self._ready = self._expect(0)
        # Of the thread.
        self._sources: dict[int, Source] = {}
        self._turns: deque[int] = deque()
        self._current: Source | None = None

    # --- on the loop ---

    async def ready(self) -> None:
        """Returns when the peer has welcomed us. Raises TransportFailed, PeerLost, or what it refused us with."""
        await asyncio.shield(self._ready)

    def new_number(self) -> int:
        """For a put or a request."""
        return next(self._numbers)

    def expect(self, number: int) -> asyncio.Future[pb.DataMessage]:
        """The next answer about that number; or raises what it failed with."""
        if self.lost:
            raise PeerLost("the connection ended")
        return self._expect(number)

    async def request(self, number: int, message: pb.DataMessage) -> pb.DataMessage:
        """Asks and waits for the answer. Raises PeerLost, also when none comes in time, and the peer's error."""
        answer = self.expect(number)
        self.say(encode_message(number, message))
        return await self.answer(answer)

    async def answer(self, answer: asyncio.Future[pb.DataMessage]) -> pb.DataMessage:
        """Waits for one. A peer that lives and does not answer cannot be relied on: the connection ends."""
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                return await asyncio.shield(answer)
        except TimeoutError:
            self.cut()
            raise PeerLost(f"no answer within {REQUEST_TIMEOUT_S:g} s") from None

    def add(self, number: int, source: Source) -> None:
        """Lets a source send; it is told if the connection has ended."""
        if not self.submit(lambda: self._add(number, source)):
            source.failed(PeerLost("the connection ended"))

    def more(self, number: int) -> None:
        """The source has frames again."""
        self.submit(lambda: self._turn(number))

    async def remove(self, number: int) -> None:
        """Returns when nothing of the source's memory is read any more; no answer is expected then. Again is no
        error."""
        self._waiting.pop(number, None)
        gone: asyncio.Future[None] = self._loop.create_future()
        if self.submit(lambda: self._remove(number, gone)):
            await asyncio.shield(gone)

    # --- on the thread ---

    def connect(self) -> Channel:
        """See Connection."""
        channel = self._make_channel()
        hello = pb.Hello(peer_version=PEER_VERSION, epoch=self._epochs[0], target_epoch=self._epochs[1])
        self._outbox.append(encode_message(0, pb.DataMessage(hello=hello)))
        return channel

    def serve(self) -> None:
        """See Connection."""
        while True:
            header = self.read_header()
            if header.kind is Kind.LANDED:
                source = self._sources.get(header.number)
                if source is not None:
                    source.landed(header.layer, header.end)
            elif header.kind is Kind.MESSAGE:
                self._message(header.number, decode_message(self.read(header.length)))
            else:
                raise ProtocolViolation(f"a frame {header.kind.name} of whoever is connected to")

    def ended(self, error: ServiceError) -> None:
        """See Connection."""
        for source in self._sources.values():
            source.failed(error)
        self._sources.clear()
        self._on_loop(lambda: self._lose(error))

    def next_bulk(self) -> list[memoryview]:
        """See Connection. One frame of each source in turn, so that a long put does not delay a short one."""
        while self._turns:
            number = self._turns.popleft()
            source = self._sources.get(number)
            frame = source.next_frame() if source is not None else []
            if frame:
                self._turns.append(number)
                self._current = source
                return frame
        self._current = None
        return []

    def sent(self, num_bytes: int, busy_ns: int) -> None:
        """See Connection."""
        if self._sending_bulk and self._current is not None:
            self._current.sent(busy_ns)

    def _message(self, number: int, message: pb.DataMessage) -> None:
        if message.WhichOneof("content") != "error":
            if message.WhichOneof("content") == "welcome":
                self.introduced()
                self.challenge = message.welcome.challenge
            self._on_loop(lambda: self._resolve(number, message))
            return
        error = to_error(message)
        if number == 0:
            raise error
        source = self._sources.get(number)
        if source is not None:
            source.failed(error)
        self._on_loop(lambda: self._fail(number, error))

    def _add(self, number: int, source: Source) -> None:
        self._sources[number] = source
        self._turn(number)

    def _turn(self, number: int) -> None:
        if number not in self._turns:
            self._turns.append(number)

    def _remove(self, number: int, gone: asyncio.Future[None]) -> None:
        source = self._sources.pop(number, None)
        if source is not None:
            if source is self._current and self._sending_bulk:
                # The frame must end as it was announced; what it holds counts no more.
                self._sending = _zeros(sum(map(len, self._sending)))
                self._current = None
            self._outbox.append(encode_message(number, pb.DataMessage(close=pb.ClosePut())))
        self._on_loop(lambda: _set(gone))

    # --- on the loop again ---

    def _expect(self, number: int) -> asyncio.Future[pb.DataMessage]:
        future: asyncio.Future[pb.DataMessage] = self._loop.create_future()
        # Nobody may wait for it any more when it fails.
        future.add_done_callback(lambda f: f.cancelled() or f.exception())
        self._waiting[number] = future
        return future

    def _resolve(self, number: int, message: pb.DataMessage) -> None:
        future = self._waiting.pop(number, None)
        if future is not None and not future.done():
            future.set_result(message)

    def _fail(self, number: int, error: ServiceError) -> None:
        future = self._waiting.pop(number, None)
        if future is not None and not future.done():
            future.set_exception(error)

    def _lose(self, error: ServiceError) -> None:
        self.lost = True
        for number in tuple(self._waiting):
            self._fail(number, error)
        self._on_end(self)

    def _on_loop(self, call: Callable[[], object]) -> None:
        self._loop.call_soon_threadsafe(call)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _zeros(num_bytes: int) -> list[memoryview]:
    whole, rest = divmod(num_bytes, len(_ZEROS))
    return [_ZEROS] * whole + ([_ZEROS[:rest]] if rest else [])
