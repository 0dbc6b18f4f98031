"""Buffers on the GPU that pages are gathered into before they are sent, and that arrive before they are scattered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

from services.kvtransfer.errors import PeerLost
from services.kvtransfer.transports.cuda_ipc.device import Device
from services.kvtransfer.transports.nccl.communicator import CommunicatorLost
from services.kvtransfer.transports.pull.slots import Slots

# In all; made as they are needed. One that a stuck stream may still touch is lost.
#
# As many kernels of NCCL run at once at most, and as many for the other direction. Each waits on the GPU for its
# peer's: if some did not fit on it beside the others, two services could wait for each other's. 2 x 12 of them, each of
# MAX_BLOCKS blocks, fit on 96 multiprocessors even at one block each. Who asks has a buffer first, so that whatever
# is sent is awaited.
NUM_BUFFERS = 12


class Buffer:
    """Memory on the GPU. Belongs to whoever took it."""

    def __init__(self, device: Device, num_bytes: int) -> None:
        self._device, self._num_bytes = device, num_bytes
        self._address: int | None = None

    def address(self) -> int:
        """Where it is; allocated the first time, which may wait for all that runs on the GPU: not for the loop.

        Raises CudaFailed.
        """
        if self._address is None:
            self._address = self._device.allocate(self._num_bytes)
        return self._address


class Buffers:
    """Belongs to the running loop."""

    def __init__(self, device: Device, buffer_bytes: int) -> None:
        self.buffer_bytes = buffer_bytes
        self._slots: Slots[Buffer] = Slots(lambda: Buffer(device, buffer_bytes), NUM_BUFFERS)

    @property
    def are_spent(self) -> bool:
        """Whether every buffer is lost."""
        return self._slots.are_spent

    @asynccontextmanager
    async def used_by(self, start: Callable[[Buffer], asyncio.Future[None]]) -> AsyncGenerator[Buffer, None]:
        """Inside, a buffer, after the call that `start` began on it has ended well. Raises PeerLost.

        Cancelling leaves the buffer with the call until that ends.
        """
        buffer = await self._slots.take()
        try:
            calling = start(buffer)
        except BaseException:
            self._slots.give_back(buffer)
            raise
        try:
            await asyncio.wait([calling])
            lost = calling.exception()
            if lost is not None:
                raise PeerLost(f"a transfer over NCCL failed: {lost}")
            yield buffer
        finally:
            calling.add_done_callback(lambda _: self._ended(buffer, calling))

    def _ended(self, buffer: Buffer, calling: asyncio.Future[None]) -> None:
        error = calling.exception()
        if isinstance(error, CommunicatorLost) and not error.drained:
            self._slots.lose(buffer)
        else:
            self._slots.give_back(buffer)
