"""Copies in device memory, on streams beside each other: by a kernel, or run by run."""

from __future__ import annotations

import queue
from dataclasses import dataclass

from services.kvtransfer.errors import DeviceFailed
from services.kvtransfer.transports.cuda_ipc.device import Copy, Device, Stream
from services.kvtransfer.transports.cuda_ipc.kernel import CopyKernel, KernelStream
from services.kvtransfer.transports.cuda_ipc.runs import RunList
from services.rpc.cuda_driver import CudaFailed


@dataclass(frozen=True, slots=True)
class _Way:
    """A stream. `listed`: with the kernel; None: without."""

    stream: Stream
    listed: KernelStream | None

    def queue(self, runs: RunList, target: int, source: int) -> None:
        if self.listed is not None:
            self.listed.copy(runs, target, source)
            return
        self.stream.copy([Copy(target + to, source + begin, num_bytes) for to, begin, num_bytes in runs.runs.tolist()])


class RunCopier:
    """Copies for any thread. What it needs of the GPU is made at the start, so that no copy fails for want of it."""

    def __init__(self, device: Device, num_streams: int, kernel: CopyKernel | None) -> None:
        """`num_streams`: calls of copy at once, others wait; `kernel`: None to copy run by run. Raises CudaFailed."""
        self._free: queue.SimpleQueue[_Way] = queue.SimpleQueue()
        for _ in range(num_streams):
            stream = device.new_stream()
            self._free.put(_Way(stream, None if kernel is None else KernelStream(kernel, device, stream)))

    def copy(self, runs: RunList, target: int, source: int) -> None:
        """Copies runs behind two addresses; returns when none is under way any more. Raises DeviceFailed unless all
        were made."""
        way = self._free.get()
        try:
            try:
                way.queue(runs, target, source)
            finally:
                # Also those that were queued before one was refused.
                way.stream.synchronize()
        except CudaFailed as error:
            raise DeviceFailed(str(error)) from None
        finally:
            self._free.put(way)
