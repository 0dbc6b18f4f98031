"""One put as its sender sees it, and the probe of a connection."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from microserve.kvtransfer.v1 import data_pb2 as pb

from services.kvtransfer.checksum import checksum_of
from services.kvtransfer.conversion import canonical_bytes
from services.kvtransfer.errors import ProtocolViolation
from services.kvtransfer.transports.base import PutProgress, PutRequest
from services.kvtransfer.transports.tcp.frames import PutPages, cut
from services.kvtransfer.transports.tcp.outbound import Outbound, Source
from services.kvtransfer.transports.tcp.wire import Header, Kind, encode_message
from services.protocol.errors import ServiceError


class TcpLane(Source):
    """Belongs to the loop; what a Source does happens on the connection's thread."""

    def __init__(
        self,
        connection: Outbound,
        number: int,
        request: PutRequest,
        max_frame_bytes: int,
        on_change: Callable[[], None],
        *,
        checksum: bool,
        verbatim: bool,
    ) -> None:
        self._connection = connection
        self._number = number
        self._pages = PutPages(request.source, request.part, request.source_page_ids)
        layout = self._pages.layout
        self._token_bytes = canonical_bytes(layout, layout.kv_head_count, 1)
        self._frames = tuple(cut(request.part, layout.page_size, self._token_bytes, max_frame_bytes, verbatim=verbatim))
        self._verbatim = verbatim
        self._frame_count = len(self._frames) * layout.layer_count
        self._checksum = checksum
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._finished = connection.expect(number)
        # Set by the loop, read by the thread.
        self._posted = 0
        # Of the thread.
        self._taken = 0
        self._busy_ns = 0
        # Changed by the thread, read by the loop.
        self._lock = threading.Lock()
        self._landed = 0
        self._num_bytes = 0
        self._failure: ServiceError | None = None
        self._notified = False

    @property
    def num_bytes(self) -> int:
        """See Lane."""
        return self._num_bytes

    @property
    def busy_s(self) -> float:
        """See Lane: seconds spent handing bytes to the kernel."""
        return self._busy_ns / 1e9

    def post(self, layer_end: int) -> None:
        """See Lane."""
        self._posted = layer_end * len(self._frames)
        self._connection.more(self._number)

    def check(self) -> PutProgress:
        """See Lane."""
        with self._lock:
            self._notified = False
            if self._failure is not None and self._landed < self._frame_count:
                raise self._failure
            return PutProgress(self._landed // len(self._frames), self._num_bytes)

    async def finish(self) -> bool:
        """See Lane. The receiver was asked with the last frame, which spares a round trip."""
        return (await self._connection.answer(self._finished)).finished.committed

    async def close(self) -> None:
        """See Lane."""
        await self._connection.remove(self._number)
        self._pages.close()

    # --- on the connection's thread ---

    def next_frame(self) -> list[memoryview]:
        """See Source."""
        if self._taken >= self._posted:
            return []
        layer, index = divmod(self._taken, len(self._frames))
        self._taken += 1
        frame = self._frames[index]
        if self._verbatim and self._pages.holds_whole(frame):
            views = self._pages.views(layer, frame)
        else:
            views = [self._pages.gather(layer, frame).data]
        length = len(frame) * self._token_bytes
        checksum = checksum_of(views) if self._checksum else 0
        header = Header(Kind.PUT, self._number, layer, frame.begin, frame.end, length, checksum)
        views.insert(0, memoryview(header.encode()))
        if self._taken == self._frame_count:
            views.append(memoryview(encode_message(self._number, pb.DataMessage(finish=pb.FinishPut()))))
        return views

    def sent(self, busy_ns: int) -> None:
        """See Source."""
        self._busy_ns += busy_ns

    def landed(self, layer: int, end: int) -> None:
        """See Source."""
        at, index = divmod(self._landed, len(self._frames))
        if self._landed >= self._taken or (layer, end) != (at, self._frames[index].end):
            raise ProtocolViolation("what was not sent cannot have landed")
        with self._lock:
            self._landed += 1
            self._num_bytes += len(self._frames[index]) * self._token_bytes
            if index + 1 < len(self._frames):
                return
        self._notify()

    def failed(self, error: ServiceError) -> None:
        """See Source. The first one counts."""
        with self._lock:
            self._failure = self._failure or error
            self._posted = 0
        self._notify()

    def _notify(self) -> None:
        with self._lock:
            if self._notified:
                return
            self._notified = True
        self._loop.call_soon_threadsafe(self._on_change)


class ProbeSource(Source):
    """So many bytes that the receiver throws away, and then a question."""

    def __init__(self, number: int, num_bytes: int) -> None:
        question = encode_message(number, pb.DataMessage(probe=pb.Probe()))
        self._frames = [memoryview(question)]
        if num_bytes:
            header = Header(Kind.DISCARD, number, length=num_bytes).encode()
            self._frames[:0] = [memoryview(header), memoryview(bytes(num_bytes))]

    def next_frame(self) -> list[memoryview]:
        """See Source."""
        frames, self._frames = self._frames, []
        return frames
