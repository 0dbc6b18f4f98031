"""The few things of a GPU that moving pages needs. The seam between the transports and the CUDA driver."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from services.rpc.cuda_driver import CudaDriver

# CU_STREAM_NON_BLOCKING: it does not wait for the default stream, nor that for it.
_NON_BLOCKING = 1


@dataclass(frozen=True, slots=True)
class Copy:
    """Bytes of device memory to another place in device memory."""

    target: int
    source: int
    num_bytes: int


class Stream(Protocol):
    """A queue of work beside everything else that the GPU does. Used by one thread at a time."""

    @property
    def handle(self) -> int:
        """The driver's CUstream."""

    def copy(self, copies: Sequence[Copy]) -> None:
        """Queues copies; returns at once. Raises CudaFailed."""

    def read_back(self, copies: Sequence[Copy]) -> None:
        """As `copy`, to targets in memory of allocate_host."""

    def is_idle(self) -> bool:
        """Whether everything queued has ended. Raises CudaFailed if some of it failed."""

    def synchronize(self) -> None:
        """Returns when everything queued has ended. Raises CudaFailed if some of it failed."""

    def close(self) -> None:
        """Lets go of it."""


class Device(Protocol):
    """One GPU. Any thread."""

    def new_stream(self) -> Stream:
        """A stream of its own. Raises CudaFailed."""

    def allocate(self, num_bytes: int) -> int:
        """Address of new memory, of undefined contents. Raises CudaFailed."""

    def allocate_host(self, num_bytes: int) -> int:
        """Address of new host memory that the GPU reads and writes by itself. Raises CudaFailed."""

    def free(self, address: int) -> None:
        """Gives memory of `allocate` back. Raises CudaFailed."""

    def free_host(self, address: int) -> None:
        """Gives memory of `allocate_host` back. Raises CudaFailed."""


class CudaDevice:
    """Device by the driver."""

    def __init__(self, driver: CudaDriver) -> None:
        self._driver = driver

    def new_stream(self) -> CudaStream:
        """See Device."""
        return CudaStream(self._driver)

    def allocate(self, num_bytes: int) -> int:
        """See Device."""
        address = ctypes.c_uint64()
        self._driver.call("cuMemAlloc_v2", ctypes.byref(address), num_bytes)
        return address.value

    def allocate_host(self, num_bytes: int) -> int:
        """See Device."""
        address = ctypes.c_void_p()
        self._driver.call("cuMemHostAlloc", ctypes.byref(address), num_bytes, 0)
        assert address.value is not None
        return address.value

    def free(self, address: int) -> None:
        """See Device."""
        self._driver.call("cuMemFree_v2", address)

    def free_host(self, address: int) -> None:
        """See Device."""
        self._driver.call("cuMemFreeHost", address)


class CudaStream:
    """Stream by the driver."""

    def __init__(self, driver: CudaDriver) -> None:
        """Raises CudaFailed."""
        stream = ctypes.c_void_p()
        driver.call("cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING)
        assert stream.value is not None
        self.handle = stream.value
        self._driver = driver

    def copy(self, copies: Sequence[Copy]) -> None:
        """See Stream."""
        for copy in copies:
            self._driver.call("cuMemcpyDtoDAsync_v2", copy.target, copy.source, copy.num_bytes, self.handle)

    def read_back(self, copies: Sequence[Copy]) -> None:
        """See Stream."""
        for copy in copies:
            self._driver.call("cuMemcpyDtoHAsync_v2", copy.target, copy.source, copy.num_bytes, self.handle)

    def is_idle(self) -> bool:
        """See Stream."""
        return self._driver.is_idle(self.handle)

    def synchronize(self) -> None:
        """See Stream."""
        self._driver.call("cuStreamSynchronize", self.handle)

    def close(self) -> None:
        """See Stream."""
        self._driver.call("cuStreamDestroy_v2", self.handle)
