"""Calls from the loop thread to the event loop."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import weakref
from collections import deque
from collections.abc import Callable

_log = logging.getLogger(__name__)

# write(2) by a call that keeps the GIL: os.write, and so call_soon_threadsafe, gives it away.
_ring = ctypes.PyDLL(None).write
_ring.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t)
_ring.restype = ctypes.c_ssize_t


class Outbox:
    """Runs calls of other threads on the event loop that it was made on, in order.

    However many wait to be run, they cost the loop one wake-up. Whoever posts keeps the GIL: else the event loop would
    serve all streams of a step before the loop thread could begin the next one. So its turn comes when kernels compute,
    which need no GIL.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._calls: deque[Callable[[], None]] = deque()
        self._is_posted = False
        self._ear, self._bell = os.pipe()
        os.set_blocking(self._ear, False)
        os.set_blocking(self._bell, False)
        weakref.finalize(self, _close, self._ear, self._bell)
        self._loop.add_reader(self._ear, self._run)

    def post(self, call: Callable[[], None]) -> None:
        """Any thread. A loop that is closed has nobody left who could want it."""
        if self._loop.is_closed():
            return
        self._calls.append(call)
        if not self._is_posted:
            self._is_posted = True
            _ring(self._bell, b"\0", 1)

    def _run(self) -> None:
        os.read(self._ear, 4096)
        # Cleared first: a call that comes after this line either is run below or posts itself.
        self._is_posted = False
        while self._calls:
            call = self._calls.popleft()
            try:
                call()
            except Exception:  # the others are of other callers
                _log.exception("a call from the loop thread failed")


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
