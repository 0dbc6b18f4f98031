"""The trial of the copy kernel at the start of a service: runs of all kinds beside the driver's own copies."""

from __future__ import annotations

import ctypes
import logging
import time
from contextlib import ExitStack

import numpy as np
from numpy.typing import NDArray

from services.kvtransfer.transports.cuda_ipc.device import Copy, CudaDevice, CudaStream
from services.kvtransfer.transports.cuda_ipc.kernel import CopyKernel, KernelStream
from services.kvtransfer.transports.cuda_ipc.runs import TILE_BYTES, RunList
from services.rpc.cuda_driver import CudaDriver, CudaFailed

log = logging.getLogger(__name__)

_TIMEOUT_S = 10.0
_PAUSE_S = 0.0005
# Lengths, and how far target and source lie off a multiple of sixteen.
_RUNS = (
    *((length, 0, 0) for length in (1, 15, 16, 17, 256, 4095, 4096, 4112, TILE_BYTES, TILE_BYTES + 1, 3 * TILE_BYTES)),
    *((length, 3, 3) for length in (1, 16, 300)),
    *((length, 8, 0) for length in (16, 257)),
    *((length, 0, 5) for length in (16, 1000)),
)


class KernelWrong(Exception):
    """It does not copy what it is told to; the message is a clause for people."""


def choose_kernel(driver: CudaDriver) -> tuple[CopyKernel | None, str]:
    """The kernel if it is right on this GPU, else None; and how pages are copied, for people."""
    try:
        kernel = CopyKernel(driver)
        _try(kernel, driver)
    except (CudaFailed, KernelWrong) as error:
        log.warning("the copy kernel is not used: pages are copied run by run", extra={"fields": {"why": str(error)}})
        return None, f"run by run: {error}"
    return kernel, "by the kernel"


def _try(kernel: CopyKernel, driver: CudaDriver) -> None:
    """Raises KernelWrong, CudaFailed. What may still be touched after a failure of the GPU is left to it."""
    device = CudaDevice(driver)
    runs, num_bytes = _scattered()
    with ExitStack() as stack:
        try:
            stream = CudaStream(driver)
            stack.callback(stream.close)
            listed = KernelStream(kernel, device, stream)
            stack.callback(listed.close)
            host = device.allocate_host(num_bytes)
            stack.callback(device.free_host, host)
            areas = []
            for seed in (1, 2, 2):
                areas.append(device.allocate(num_bytes))
                stack.callback(device.free, areas[-1])
                _bytes_at(host, num_bytes)[:] = np.random.default_rng(seed).integers(0, 256, num_bytes, np.uint8)
                driver.call("cuMemcpyHtoDAsync_v2", areas[-1], host, num_bytes, stream.handle)
                stream.synchronize()
            source, wanted, found = areas
            stream.copy([Copy(wanted + to, source + begin, length) for to, begin, length in runs.runs.tolist()])
            listed.copy(runs, found, source)
            _finish(stream)
            seen = []
            for area in (wanted, found):
                stream.read_back([Copy(host, area, num_bytes)])
                stream.synchronize()
                seen.append(_bytes_at(host, num_bytes).copy())
        except CudaFailed:
            stack.pop_all()
            raise
    # All of it, so that what lies between runs must be as it was.
    if not np.array_equal(seen[0], seen[1]):
        raise KernelWrong("it copies other bytes than the driver")


def _scattered() -> tuple[RunList, int]:
    """Runs with gaps between them, in reverse order at the target; and the bytes of either side."""
    rooms = [length // 16 * 16 + 48 for length, _, _ in _RUNS]
    begins = np.cumsum([0, *rooms]).tolist()
    rows = [
        (begins[-1] - begins[index + 1] + to, begins[index] + begin, length)
        for index, (length, to, begin) in enumerate(_RUNS)
    ]
    return RunList.of(rows), begins[-1]


def _bytes_at(address: int, num_bytes: int) -> NDArray[np.uint8]:
    return np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address))


def _finish(stream: CudaStream) -> None:
    """Waits for what is queued, bounded: a kernel that never ends must not keep the service from its start."""
    deadline_s = time.monotonic() + _TIMEOUT_S
    while not stream.is_idle():
        if time.monotonic() >= deadline_s:
            raise CudaFailed(f"the kernel did not end within {_TIMEOUT_S:g} s")
        time.sleep(_PAUSE_S)
