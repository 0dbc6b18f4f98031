"""NCCL without NCCL: the ranks of a pair find each other in this process, and every call is noted in its order."""

from __future__ import annotations

import ctypes
import threading
from itertools import count

from services.kvtransfer.transports.nccl.library import UNIQUE_ID_BYTES, CommunicatorState, NcclFailed
from tests.kvtransfer.cuda.fake_device import FakeDevice


class _Pair:
    def __init__(self) -> None:
        self.ranks: set[int] = set()
        self.sent: list[bytes] = []
        self.wanted: list[tuple[int, int]] = []


class FakeNccl:
    """See library.Nccl. `log` has the calls; what `failing` names raises."""

    def __init__(self, device: FakeDevice) -> None:
        self.log: list[str] = []
        self.failing: set[str] = set()
        # An asynchronous error that every communicator has from now on.
        self.broken = False
        # From now on bytes arrive otherwise than they were sent.
        self.altered = False
        self._device = device
        self._ids = count(1)
        self._handles = count(100)
        self._pairs: dict[bytes, _Pair] = {}
        self._communicators: dict[int, tuple[_Pair, int]] = {}
        self._lock = threading.Lock()

    def unique_id(self) -> bytes:
        self._note("unique_id")
        return next(self._ids).to_bytes(UNIQUE_ID_BYTES)

    def init(self, unique_id: bytes, rank: int) -> int:
        self._note(f"init {rank}")
        with self._lock:
            pair = self._pairs.setdefault(unique_id, _Pair())
            assert rank not in pair.ranks, "a rank joins once"
            pair.ranks.add(rank)
            handle = next(self._handles)
            self._communicators[handle] = pair, rank
        return handle

    def state(self, communicator: int) -> CommunicatorState:
        if self.broken:
            raise NcclFailed("remote process exited")
        with self._lock:
            pair, rank = self._communicators[communicator]
            self._match(pair)
            # In these tests rank 0 sends and rank 1 receives.
            ready = len(pair.ranks) == 2 and not (pair.wanted if rank else pair.sent)
        return CommunicatorState.READY if ready else CommunicatorState.IN_PROGRESS

    def group_start(self) -> None:
        self._note("group_start")

    def group_end(self) -> None:
        self._note("group_end")

    def send(self, communicator: int, address: int, num_bytes: int, stream: int) -> None:
        self._note(f"send {num_bytes}")
        pair, _ = self._communicators[communicator]

        def send() -> None:
            with self._lock:
                pair.sent.append(ctypes.string_at(address, num_bytes))
                self._match(pair)

        self._device.streams[stream - 1].queue(send)

    def receive(self, communicator: int, address: int, num_bytes: int, stream: int) -> None:
        self._note(f"receive {num_bytes}")
        with self._lock:
            self._communicators[communicator][0].wanted.append((address, num_bytes))

    def rank(self, communicator: int) -> int:
        """Which end it is."""
        return self._communicators[communicator][1]

    def abort(self, communicator: int) -> None:
        self._note("abort")
        with self._lock:
            pair, rank = self._communicators.pop(communicator)
            (pair.wanted if rank else pair.sent).clear()

    def _match(self, pair: _Pair) -> None:
        while pair.sent and pair.wanted:
            data, (address, num_bytes) = pair.sent.pop(0), pair.wanted.pop(0)
            assert len(data) == num_bytes, "both sides name the same number of bytes"
            ctypes.memmove(address, data, num_bytes)
            if self.altered:
                ctypes.memset(address, data[0] ^ 1, 1)

    def _note(self, call: str) -> None:
        self.log.append(call)
        if call.split()[0] in self.failing:
            raise NcclFailed(f"{call} failed")
