"""Buffers on the GPU that pages are gathered into before they are sent, and that arrive before they are scattered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

from services.kvtransfer.errors import PeerLost
from services.kvtransfer.transports.cuda_ipc.device import Device
from services.kvtransfer.transports.nccl.communicator import CommunicatorLost
from services.kvtransfer.transports.pull.slots import Slots
from services.rpc.cuda_driver import CudaFailed

# In all; made as they are needed. One that a stuck stream may still touch is lost.
NUM_BUFFERS = 32


class Buffers:
    """Belongs to the running loop."""

    def __init__(self, device: Device, buffer_bytes: int) -> None:
        self.buffer_bytes = buffer_bytes
        self._slots: Slots[int] = Slots(lambda: device.allocate(buffer_bytes), NUM_BUFFERS)

    @property
    def are_spent(self) -> bool:
        """Whether every buffer is lost."""
        return self._slots.are_spent

    @asynccontextmanager
    async def used_by(self, start: Callable[[int], asyncio.Future[None]]) -> AsyncGenerator[int, None]:
        """Inside, a buffer's address, after the call that `start` began on it has ended well. Raises PeerLost.

        Cancelling leaves the buffer with the call until that ends.
        """
        try:
            buffer = await self._slots.take()
        except CudaFailed as error:
            raise PeerLost(f"no memory for a transfer buffer: {error}") from None
        calling = start(buffer)
        try:
            await asyncio.wait([calling])
            lost = calling.exception()
            if lost is not None:
                raise PeerLost(f"the NCCL communicator is lost: {lost}")
            yield buffer
        finally:
            calling.add_done_callback(lambda _: self._ended(buffer, calling))

    def _ended(self, buffer: int, calling: asyncio.Future[None]) -> None:
        error = calling.exception()
        if isinstance(error, CommunicatorLost) and not error.drained:
            self._slots.lose(buffer)
        else:
            self._slots.give_back(buffer)
