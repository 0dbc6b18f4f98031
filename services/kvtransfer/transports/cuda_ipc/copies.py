"""Copies in device memory, and the streams that threads make them on."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from services.kvtransfer.errors import DeviceFailed
from services.kvtransfer.plan import Run, spans
from services.kvtransfer.transports.cuda_ipc.device import Copy, Device, Stream
from services.protocol.layout import PageLayout
from services.rpc.cuda_driver import CudaFailed


@dataclass(frozen=True, slots=True)
class PoolPlace:
    """A layer of a pool in device memory."""

    address: int
    page_count: int
    layer: int


class ThreadStreams:
    """A stream of its own for each thread, so that copies of one do not wait for those of another."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._local = threading.local()

    def copy(self, copies: Sequence[Copy]) -> None:
        """Returns when none is under way any more. Raises DeviceFailed unless all were made."""
        try:
            stream = self._stream()
            try:
                stream.copy(copies)
            finally:
                # Also those that were queued before one was refused.
                stream.synchronize()
        except CudaFailed as error:
            raise DeviceFailed(str(error)) from None

    def _stream(self) -> Stream:
        stream: Stream | None = getattr(self._local, "stream", None)
        if stream is None:
            stream = self._local.stream = self._device.new_stream()
        return stream


def scatter_copies(
    buffer: int, pool: int, layer: int, runs: Sequence[Run], layout: PageLayout, page_count: int
) -> list[Copy]:
    """From a buffer, filled in the order of extents_of, to the target side of `runs` in a pool. Both are addresses."""
    copies = []
    for run in runs:
        for offset, num_bytes in spans(layer, run.target_pages, run.target_tokens, layout, page_count):
            copies.append(Copy(pool + offset, buffer, num_bytes))
            buffer += num_bytes
    return copies


def pool_copies(source: PoolPlace, target: PoolPlace, runs: Sequence[Run], layout: PageLayout) -> list[Copy]:
    """From the source side of `runs` in one pool to the target side in another, page by page alike."""
    copies = []
    for run in runs:
        sources = spans(source.layer, run.source_pages, run.source_tokens, layout, source.page_count)
        targets = spans(target.layer, run.target_pages, run.target_tokens, layout, target.page_count)
        for (from_offset, num_bytes), (to_offset, _) in zip(sources, targets, strict=True):
            copies.append(Copy(target.address + to_offset, source.address + from_offset, num_bytes))
    return copies
