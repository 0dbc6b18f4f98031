"""A GPU without a GPU: device memory is host memory, and streams do their work when the test lets them."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from services.kvtransfer.transports.cuda_ipc.device import Copy
from services.rpc.cuda_driver import CudaFailed


class FakeStream:
    """See device.Stream. While it is held nothing that is queued happens."""

    def __init__(self, handle: int, device: FakeDevice) -> None:
        self.handle = handle
        self.log = device.log
        self._device = device
        self.held = False
        self.fails = False
        self.queued: list[Callable[[], None]] = []

    def copy(self, copies: Sequence[Copy]) -> None:
        self.log.append(f"copy {sum(copy.num_bytes for copy in copies)}")
        for copy in copies:
            self.queue(lambda copy=copy: ctypes.memmove(copy.target, copy.source, copy.num_bytes))

    def read_back(self, copies: Sequence[Copy]) -> None:
        self.log.append(f"read {sum(copy.num_bytes for copy in copies)}")
        for copy in copies:
            self.queue(lambda copy=copy: ctypes.memmove(copy.target, copy.source, copy.num_bytes))

    def queue(self, work: Callable[[], object]) -> None:
        self.queued.append(lambda: work() and None)
        if self.held:
            self._device.stuck.set()
        self._run()

    def is_idle(self) -> bool:
        if self.fails:
            raise CudaFailed("the stream failed")
        self._run()
        return not self.queued

    def synchronize(self) -> None:
        assert self.is_idle(), "a test that holds a stream does not wait for it"

    def close(self) -> None:
        self._device.refuse("close")
        self.log.append("close stream")

    def _run(self) -> None:
        while self.queued and not self.held:
            self.queued.pop(0)()


class FakeDevice:
    """See device.Device. What `failing` names raises; `allocating` are names of threads that allocated."""

    def __init__(self) -> None:
        self.failing: set[str] = set()
        self.allocating: set[str] = set()
        # Set when something was queued on a stream that is held.
        self.stuck = threading.Event()
        self.memory: dict[int, NDArray[np.uint8]] = {}
        self.streams: list[FakeStream] = []
        self.log: list[str] = []
        self._lock = threading.Lock()

    def new_stream(self) -> FakeStream:
        self.refuse("new_stream")
        with self._lock:
            self.streams.append(FakeStream(len(self.streams) + 1, self))
            return self.streams[-1]

    def allocate(self, num_bytes: int) -> int:
        self.refuse("allocate")
        self.allocating.add(threading.current_thread().name)
        memory = np.zeros(num_bytes, np.uint8)
        self.memory[memory.ctypes.data] = memory
        return memory.ctypes.data

    def refuse(self, call: str) -> None:
        """Raises if the test says so."""
        if call in self.failing:
            raise CudaFailed(f"{call} failed")

    def allocate_host(self, num_bytes: int) -> int:
        return self.allocate(num_bytes)

    def free(self, address: int) -> None:
        del self.memory[address]

    def free_host(self, address: int) -> None:
        self.free(address)
