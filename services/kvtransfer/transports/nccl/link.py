"""A communicator with the thread that it belongs to. Each push has one for itself, so that a push that is broken off
leaves no call of another one unmatched."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from services.kvtransfer.transports.nccl.communicator import Communicator, CommunicatorLost
from services.kvtransfer.transports.nccl.library import UNIQUE_ID_BYTES

NAME = "nccl"
_WIRE = struct.Struct(f"!4s?{UNIQUE_ID_BYTES}s")
_MAGIC = b"MSC1"


@dataclass(frozen=True, slots=True)
class Offer:
    """The sender's communicator. `is_fresh`: it is made now, by both; else both have it from an earlier push."""

    unique_id: bytes
    is_fresh: bool

    def encode(self) -> bytes:
        """The bytes in PullOpen.offer."""
        return _WIRE.pack(_MAGIC, self.is_fresh, self.unique_id)

    @classmethod
    def decode(cls, data: bytes) -> Offer:
        """Raises ValueError if it is none."""
        if len(data) != _WIRE.size or data[:4] != _MAGIC:
            raise ValueError("no offer of this version of the transport")
        _, is_fresh, unique_id = _WIRE.unpack(data)
        return cls(unique_id, is_fresh)


class Link:
    """Belongs to the running loop; the communicator's calls run on a thread of its own, in the order given."""

    def __init__(self, unique_id: bytes, connect: Callable[[threading.Event], Communicator]) -> None:
        """Begins to connect."""
        self.unique_id = unique_id
        self._stopped = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="nccl")
        self._connecting = self._thread.submit(connect, self._stopped)

    async def connected(self) -> None:
        """Returns when both ends are. Raises CommunicatorLost; cancelling only stops waiting."""
        waiting = asyncio.wrap_future(self._connecting)
        await asyncio.wait([waiting])
        waiting.result()

    def run(self, call: Callable[[Communicator], None]) -> asyncio.Future[None]:
        """Queues a call; the future tells how it ended, at worst by CommunicatorLost. Do not cancel it."""
        return asyncio.wrap_future(self._thread.submit(lambda: call(self._connecting.result())))

    async def close(self) -> None:
        """Aborts, and returns when that is done. Calls that are queued, or come later, fail."""
        self._stopped.set()
        await asyncio.wait([asyncio.wrap_future(self._thread.submit(self._abort))])
        self._thread.shutdown(wait=False)

    def _abort(self) -> None:
        # On the thread itself, behind the connecting and every call.
        with contextlib.suppress(CommunicatorLost):
            self._connecting.result().close()
