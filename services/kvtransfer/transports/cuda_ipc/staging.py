"""Checksums of device memory: its bytes pass through a little pinned host memory and are hashed there."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable, Iterator

from services.kvtransfer.checksum import checksum_of
from services.kvtransfer.errors import DeviceFailed
from services.kvtransfer.transports.cuda_ipc.device import Copy, Device
from services.rpc.cuda_driver import CudaFailed

STAGING_BYTES = 2 << 20


class Staging:
    """Memory for one read at a time. Any thread."""

    def __init__(self, device: Device, num_bytes: int = STAGING_BYTES) -> None:
        """Raises CudaFailed."""
        self._address = device.allocate_host(num_bytes)
        self._stream = device.new_stream()
        self._view = memoryview((ctypes.c_ubyte * num_bytes).from_address(self._address)).cast("B")
        self._lock = threading.Lock()

    def checksum(self, places: Iterable[tuple[int, int]]) -> int:
        """XXH3 of (address, bytes) of device memory, in order: the same as of the same bytes in host memory. Blocks,
        and returns or raises DeviceFailed when nothing is read any more."""
        try:
            return checksum_of(self._read(places))
        except CudaFailed as error:
            raise DeviceFailed(str(error)) from None

    def _read(self, places: Iterable[tuple[int, int]]) -> Iterator[memoryview]:
        """The bytes, as much at a time as there is memory for; each view is good until the next one."""
        for copies in _rounds(places, self._address, len(self._view)):
            # Not for longer: a short read waits for a part of a long one.
            with self._lock:
                try:
                    self._stream.read_back(copies)
                finally:
                    # Also what was queued before one was refused.
                    self._stream.synchronize()
                yield self._view[: sum(copy.num_bytes for copy in copies)]


def _rounds(places: Iterable[tuple[int, int]], staging: int, num_bytes: int) -> Iterator[list[Copy]]:
    """Copies that fill `num_bytes` at `staging` from its begin, again and again; only the last may leave some of it."""
    copies: list[Copy] = []
    filled = 0
    for address, left in places:
        while left:
            taken = min(left, num_bytes - filled)
            copies.append(Copy(staging + filled, address, taken))
            address, left, filled = address + taken, left - taken, filled + taken
            if filled == num_bytes:
                yield copies
                copies, filled = [], 0
    if copies:
        yield copies
