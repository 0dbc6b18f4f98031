"""Calls from the loop thread to the event loop."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable

_log = logging.getLogger(__name__)


class Outbox:
    """Runs calls of other threads on the event loop that it was made on, in order.

    However many wait to be run, they cost the loop one wake-up: each is a system call, and at each the calling thread
    gives the GIL away and has to get it back.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._calls: deque[Callable[[], None]] = deque()
        self._is_posted = False

    def post(self, call: Callable[[], None]) -> None:
        """Any thread. A loop that is closed has nobody left who could want it."""
        if self._loop.is_closed():
            return
        self._calls.append(call)
        if not self._is_posted:
            self._is_posted = True
            self._loop.call_soon_threadsafe(self._run)

    def _run(self) -> None:
        # Cleared first: a call that comes after this line either is run below or posts itself.
        self._is_posted = False
        while self._calls:
            call = self._calls.popleft()
            try:
                call()
            except Exception:  # the others are of other callers
                _log.exception("a call from the loop thread failed")
