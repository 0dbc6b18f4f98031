"""The control page of a pool: ready counters that its engine raises, and the eventfd that tells of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterator

from services.kvtransfer.errors import InvalidPool
from services.kvtransfer.memory import SharedSegment, cannot_give
from services.rpc.pool_client import SLOT_BYTES, slot_view


class ControlPage:
    """Ready counters in shared memory and who waits for them. Belongs to the running loop."""

    def __init__(self, segment: SharedSegment, eventfd: int) -> None:
        """Takes both over."""
        self._segment = segment
        self._slots = slot_view(segment.array)
        self.eventfd = eventfd
        self._listeners: set[Callable[[], None]] = set()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(eventfd, self._raised)

    @classmethod
    def create(cls, name: str, slot_count: int) -> ControlPage:
        """A new page with all counters 0. Raises NoMemory."""
        segment = SharedSegment.create(name, slot_count * SLOT_BYTES, prefault=True)
        try:
            eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        except OSError as error:
            segment.close()
            raise cannot_give("a descriptor", error) from error
        return cls(segment, eventfd)

    @classmethod
    def adopt(cls, descriptor: int, eventfd: int) -> ControlPage:
        """A page that an earlier incarnation made. Takes both descriptors over, also when it raises InvalidPool."""
        try:
            # An earlier incarnation may have been told another number of counters.
            slot_count = max(1, os.fstat(descriptor).st_size // SLOT_BYTES)
            segment = SharedSegment.adopt(descriptor, slot_count * SLOT_BYTES)
        except InvalidPool:
            os.close(eventfd)
            raise
        if os.readlink(f"/proc/self/fd/{eventfd}") != "anon_inode:[eventfd]":
            os.close(eventfd)
            segment.close()
            raise InvalidPool("the third descriptor handed back is no eventfd")
        os.set_blocking(eventfd, False)
        return cls(segment, eventfd)

    @property
    def descriptor(self) -> int:
        """The memory's descriptor."""
        return self._segment.descriptor

    @property
    def slot_count(self) -> int:
        """Number of counters."""
        return len(self._slots)

    def clear(self) -> None:
        """Sets all counters to 0, before a new engine comes."""
        self._slots[:] = 0

    def ready_layers(self, slot: int) -> int:
        """What the engine last wrote."""
        return int(self._slots[slot])

    @contextlib.contextmanager
    def listening(self, listener: Callable[[], None]) -> Iterator[None]:
        """Inside, `listener` is called on the loop whenever some counter rose."""
        self._listeners.add(listener)
        try:
            yield
        finally:
            self._listeners.discard(listener)

    def close(self) -> None:
        """Stops listening and unmaps the page. Again is no error."""
        if self.eventfd < 0:
            return
        self._loop.remove_reader(self.eventfd)
        os.close(self.eventfd)
        self.eventfd = -1
        del self._slots
        self._segment.close()

    def _raised(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.eventfd)
        for listener in tuple(self._listeners):
            listener()
