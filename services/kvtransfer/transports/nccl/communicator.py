"""A communicator of two ranks that always answers: every call has a deadline, and what missed one is aborted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from services.kvtransfer.transports.cuda_ipc.device import Copy, Device, Stream
from services.kvtransfer.transports.nccl.library import CommunicatorState, Nccl, NcclFailed
from services.rpc.cuda_driver import CudaFailed


class CommunicatorLost(Exception):
    """The communicator was aborted, now or before; its message says why.

    `drained`: whether nothing that it had queued reads or writes memory any more.
    """

    def __init__(self, why: str, *, drained: bool) -> None:
        super().__init__(why)
        self.drained = drained


@dataclass(frozen=True, slots=True)
class Patience:
    """How waiting is done. `clock` in seconds; `pause` sleeps between two looks."""

    clock: Callable[[], float]
    pause: Callable[[], None]
    timeout_s: float


class Communicator:
    """One end of a pair. Its methods block, bounded; one thread at a time.

    A side that misses a deadline, hears of an error or is stopped aborts; the other side's calls then miss theirs.
    Nothing is repaired: a new pair under a new id takes its place.
    """

    def __init__(
        self,
        nccl: Nccl,
        stream: Stream,
        unique_id: bytes,
        rank: int,
        patience: Patience,
        stopped: threading.Event,
    ) -> None:
        """Connects. Takes the stream over. `stopped`, once set by any thread, makes the call under way and every later
        one raise soon. Raises CommunicatorLost."""
        self._nccl = nccl
        self._stream = stream
        self._patience = patience
        self._stopped = stopped
        self._why_lost: CommunicatorLost | None = None
        self._handle: int | None = None
        try:
            self._handle = nccl.init(unique_id, rank)
        except NcclFailed as error:
            raise self._lose(str(error)) from None
        self._until_done()

    def send(self, copies: Sequence[Copy], address: int, num_bytes: int) -> None:
        """Gathers by `copies` into the buffer at `address` and sends it. Returns when it is sent; raises
        CommunicatorLost."""
        self._move(copies, partial(self._nccl.send, address=address, num_bytes=num_bytes, stream=self._stream.handle))

    def receive(self, address: int, num_bytes: int) -> None:
        """Returns when the other rank's bytes are in the buffer. Raises CommunicatorLost."""
        self._move((), partial(self._nccl.receive, address=address, num_bytes=num_bytes, stream=self._stream.handle))

    def close(self) -> None:
        """Aborts what is not aborted yet. Returns when nothing it had queued goes on; raises CommunicatorLost with
        `drained` false when that cannot be told."""
        if self._why_lost is None:
            self._lose("closed")
        if self._why_lost is not None and not self._why_lost.drained:
            raise self._why_lost

    def _move(self, copies: Sequence[Copy], queue: Callable[[int], None]) -> None:
        if self._why_lost is not None:
            raise self._why_lost
        assert self._handle is not None
        if self._stopped.is_set():
            # The pages are not this push's any more.
            raise self._lose("stopped")
        try:
            self._stream.copy(copies)
            self._nccl.group_start()
            try:
                queue(self._handle)
            finally:
                self._nccl.group_end()
        except (NcclFailed, CudaFailed) as error:
            raise self._lose(str(error)) from None
        self._until_done()

    def _until_done(self) -> None:
        """Waits until the last call is queued and everything queued has ended."""
        assert self._handle is not None
        deadline_s = self._patience.clock() + self._patience.timeout_s
        while True:
            if self._stopped.is_set():
                raise self._lose("stopped")
            try:
                if self._nccl.state(self._handle) is CommunicatorState.READY and self._stream.is_idle():
                    return
            except (NcclFailed, CudaFailed) as error:
                raise self._lose(str(error)) from None
            if self._patience.clock() >= deadline_s:
                raise self._lose(f"no answer within {self._patience.timeout_s:g} s")
            self._patience.pause()

    def _lose(self, why: str) -> CommunicatorLost:
        """Aborts, once, and waits for the stream: until it is idle, queued kernels may still touch buffers."""
        drained = False
        try:
            if self._handle is not None:
                handle, self._handle = self._handle, None
                self._nccl.abort(handle)
            deadline_s = self._patience.clock() + self._patience.timeout_s
            while not self._stream.is_idle() and self._patience.clock() < deadline_s:
                self._patience.pause()
            drained = self._stream.is_idle()
            if drained:
                self._stream.close()
        except (NcclFailed, CudaFailed) as error:
            why, drained = f"{why}; {error}", False
        self._why_lost = CommunicatorLost(why, drained=drained)
        return self._why_lost


def connect(
    nccl: Nccl, device: Device, unique_id: bytes, rank: int, patience: Patience, stopped: threading.Event
) -> Communicator:
    """A communicator on a stream of its own, on the thread that calls it from then on: NCCL takes the GPU whose context
    is the thread's, and making a stream sets that. Raises CommunicatorLost."""
    try:
        stream = device.new_stream()
    except CudaFailed as error:
        raise CommunicatorLost(str(error), drained=True) from None
    return Communicator(nccl, stream, unique_id, rank, patience, stopped)
