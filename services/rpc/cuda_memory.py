"""Memory of a GPU that two processes map: made by one, passed to the other as a descriptor (CUDA's VMM interface).

Unlike memory shared through older CUDA IPC handles it belongs to no process: it stays for as long as some process
maps it or holds a descriptor of it, so neither side's death takes it from the other.
"""

from __future__ import annotations

import ctypes
import logging
import os

from services.rpc.cuda_driver import CudaDriver, CudaFailed

log = logging.getLogger(__name__)

_POSIX_DESCRIPTOR = 1
_MINIMUM_GRANULARITY = 0


class DeviceSegment:
    """Mapped device memory of fixed size. `address` is good in this process only."""

    def __init__(self, driver: CudaDriver, handle: ctypes.c_uint64, descriptor: int, size_bytes: int) -> None:
        """Maps the allocation and takes its descriptor over; the handle is released. Raises CudaFailed."""
        self.descriptor = descriptor
        self.size_bytes = size_bytes
        self._driver = driver
        address = ctypes.c_uint64()
        try:
            self._mapped_bytes = padded_bytes(driver, size_bytes)
            driver.call("cuMemAddressReserve", ctypes.byref(address), self._mapped_bytes, 0, 0, 0)
            try:
                driver.call("cuMemMap", address.value, self._mapped_bytes, 0, handle, 0)
                try:
                    access = driver.full_access()
                    driver.call("cuMemSetAccess", address.value, self._mapped_bytes, ctypes.byref(access), 1)
                except CudaFailed:
                    driver.call("cuMemUnmap", address.value, self._mapped_bytes)
                    raise
            except CudaFailed:
                driver.call("cuMemAddressFree", address.value, self._mapped_bytes)
                raise
        finally:
            # The mapping and the descriptor keep the memory.
            driver.call("cuMemRelease", handle)
        self.address = address.value

    @classmethod
    def create(cls, driver: CudaDriver, size_bytes: int) -> DeviceSegment:
        """New memory of undefined contents. Raises CudaFailed, for instance when there is not so much."""
        handle, descriptor = ctypes.c_uint64(), ctypes.c_int(-1)
        properties, mapped_bytes = driver.pinned_memory(), padded_bytes(driver, size_bytes)
        driver.call("cuMemCreate", ctypes.byref(handle), mapped_bytes, ctypes.byref(properties), 0)
        try:
            driver.call("cuMemExportToShareableHandle", ctypes.byref(descriptor), handle, _POSIX_DESCRIPTOR, 0)
        except CudaFailed:
            driver.call("cuMemRelease", handle)
            raise
        return _own(driver, handle, descriptor.value, size_bytes)

    @classmethod
    def adopt(cls, driver: CudaDriver, descriptor: int, size_bytes: int) -> DeviceSegment:
        """Memory that another process made, by its descriptor. Takes the descriptor over, also when it raises
        CudaFailed because it is no such memory, or smaller."""
        handle = ctypes.c_uint64()
        try:
            # By value: the driver takes the number itself where a pointer is declared.
            driver.call("cuMemImportFromShareableHandle", ctypes.byref(handle), descriptor, _POSIX_DESCRIPTOR)
        except CudaFailed:
            os.close(descriptor)
            raise
        return _own(driver, handle, descriptor, size_bytes)

    def close(self) -> None:
        """Unmaps it; what is queued on the GPU must have ended. Again is no error. What a GPU that failed refuses to
        unmap stays mapped for as long as the process lives: whoever lets go of more than this goes on."""
        if self.descriptor < 0:
            return
        os.close(self.descriptor)
        self.descriptor = -1
        try:
            self._driver.call("cuMemUnmap", self.address, self._mapped_bytes)
            self._driver.call("cuMemAddressFree", self.address, self._mapped_bytes)
        except CudaFailed as error:
            log.warning("memory of the GPU stays mapped", extra={"fields": {"why": str(error)}})


def padded_bytes(driver: CudaDriver, size_bytes: int) -> int:
    """The size of an allocation that holds so much: a multiple of what the GPU maps at once."""
    granularity, properties = ctypes.c_size_t(), driver.pinned_memory()
    driver.call(
        "cuMemGetAllocationGranularity", ctypes.byref(granularity), ctypes.byref(properties), _MINIMUM_GRANULARITY
    )
    return -(-size_bytes // granularity.value) * granularity.value


def _own(driver: CudaDriver, handle: ctypes.c_uint64, descriptor: int, size_bytes: int) -> DeviceSegment:
    try:
        return DeviceSegment(driver, handle, descriptor, size_bytes)
    except CudaFailed:
        os.close(descriptor)
        raise
