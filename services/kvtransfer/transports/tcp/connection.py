"""What both ends of a connection do alike: a thread that reads frame by frame, and sends whenever there is room."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from services.kvtransfer.errors import PeerLost, ProtocolViolation, TransportFailed
from services.kvtransfer.transports.tcp.channel import Channel, advance
from services.kvtransfer.transports.tcp.wire import HEADER_BYTES, Header, Kind
from services.protocol.errors import ServiceError

log = logging.getLogger(__name__)

# Messages that wait for a peer that does not read.
_MOST_WAITING = 4_096
_BEAT = Header(Kind.BEAT).encode()
_SCRATCH_BYTES = 1 << 18


class Connection:
    """Runs on a thread of its own, which alone touches the channel; `say` and `submit` are for all threads."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._lock = threading.Lock()
        self._calls: deque[Callable[[], None]] = deque()
        self._ended = False
        # Of the thread alone.
        self._channel: Channel | None = None
        self._outbox: deque[bytes] = deque()
        self._sending: list[memoryview] = []
        self._sending_bulk = False
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))

    def start(self) -> None:
        """Begins to run. Raises TransportFailed if the machine gives no thread."""
        try:
            self._thread.start()
        except RuntimeError as error:
            raise TransportFailed(f"the machine gives no thread: {error}") from None

    def join(self) -> None:
        """Returns when the thread has ended."""
        self._thread.join()

    def submit(self, call: Callable[[], None]) -> bool:
        """Has the thread call soon. Returns whether it will: False if the connection has ended."""
        with self._lock:
            if self._ended:
                return False
            self._calls.append(call)
            channel = self._channel
        if channel is not None:
            channel.wake()
        return True

    def say(self, frame: bytes) -> None:
        """Sends a frame soon; nothing happens if the connection has ended."""
        self.submit(lambda: self._outbox.append(frame))

    def cut(self) -> None:
        """Ends the connection soon."""
        self.submit(self._cut)

    # --- for the ends ---

    def connect(self) -> Channel:
        """The channel; called first on the thread. Raises PeerLost or TransportFailed."""
        raise NotImplementedError

    def serve(self) -> None:
        """Reads frames until an error ends the connection."""
        raise NotImplementedError

    def ended(self, error: ServiceError) -> None:
        """The connection is over; called last on the thread."""
        raise NotImplementedError

    def next_bulk(self) -> list[memoryview]:
        """What to send when no message waits; empty: nothing."""
        return []

    def sent(self, num_bytes: int, busy_ns: int) -> None:
        """So much was just sent, and took so long."""

    def read_header(self) -> Header:
        """The next frame that is no beat."""
        while True:
            data = bytearray(HEADER_BYTES)
            self.fill([memoryview(data)])
            header = Header.decode(data)
            if header.kind is not Kind.BEAT:
                return header

    def read(self, num_bytes: int) -> bytearray:
        """The body of a message."""
        data = bytearray(num_bytes)
        self.fill([memoryview(data)])
        return data

    def discard(self, num_bytes: int) -> None:
        """Reads what nobody wants."""
        while num_bytes:
            view = self._scratch[:num_bytes]
            self.fill([view])
            num_bytes -= len(view)

    def fill(self, views: list[memoryview]) -> None:
        """Fills non-empty views; sends meanwhile."""
        while views:
            self.fill_some(views, self.receive)

    def fill_some(self, views: list[memoryview], receive: Callable[[list[memoryview]], int]) -> None:
        """One attempt to fill them, after sending what can be sent; waits if neither goes on. Drops what is filled."""
        sent = self._pump()
        count = receive(views)
        advance(views, count)
        if not count and not sent:
            self._wait()

    def introduced(self) -> None:
        """The peer has said who it is."""
        assert self._channel is not None
        self._channel.introduced()

    def receive(self, views: list[memoryview]) -> int:
        """Fills what it can at once; returns the number of bytes."""
        assert self._channel is not None
        return self._channel.receive(views)

    def _wait(self) -> None:
        assert self._channel is not None
        beat = self._channel.wait(to_send=bool(self._sending))
        if beat and not self._sending:
            self._outbox.append(_BEAT)

    def _pump(self) -> bool:
        """Does what other threads submitted and sends what there is room for. Returns whether it sent any."""
        assert self._channel is not None
        while self._calls:
            self._calls.popleft()()
        if len(self._outbox) > _MOST_WAITING:
            raise ProtocolViolation("the peer does not read what it asked for")
        if not self._sending:
            self._sending_bulk = not self._outbox
            if self._outbox:
                self._sending = [memoryview(b"".join(self._outbox))]
                self._outbox.clear()
            else:
                self._sending = self.next_bulk()
        if not self._sending:
            return False
        begin_ns = time.perf_counter_ns()
        count = self._channel.send(self._sending)
        self.sent(count, time.perf_counter_ns() - begin_ns)
        advance(self._sending, count)
        return count > 0

    def _cut(self) -> None:
        raise PeerLost("the connection was closed here")

    def _run(self) -> None:
        try:
            channel = self.connect()
            with self._lock:
                self._channel = channel
            self.serve()
            raise AssertionError("a connection is served until an error ends it")
        except ServiceError as error:
            self._end(error)
        except Exception:
            # Of one connection, whatever it was.
            log.exception("connection failed", extra={"fields": {"connection": self.name}})
            self._end(PeerLost("the connection failed"))

    def _end(self, error: ServiceError) -> None:
        with self._lock:
            self._ended = True
        # What was submitted before counts still: somebody may wait for it. A second cut is none.
        while self._calls:
            with contextlib.suppress(ServiceError):
                self._calls.popleft()()
        try:
            self.ended(error)
        finally:
            self._sending = []
            if self._channel is not None:
                self._channel.close()
