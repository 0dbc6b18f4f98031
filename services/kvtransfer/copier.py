"""Threads that copy, shared fairly by everything that has copies to do."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

# One copy. It raises nothing: what goes wrong is the owner's to keep.
Copy = Callable[[], None]


class CopySource(Protocol):
    """Something that has copies to do."""

    def take(self) -> Copy | None:
        """The next copy, or None if there is none now. Called by a copying thread; must be quick."""


class Copier:
    """Takes one copy from each source in turn, so that a long push does not delay a short one."""

    def __init__(self, thread_count: int) -> None:
        self._wake = threading.Condition()
        self._queue: deque[CopySource] = deque()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"copy-{i}", daemon=True) for i in range(thread_count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, source: CopySource) -> None:
        """The source has copies to do: it is asked until it has none. Again is no error."""
        with self._wake:
            if source not in self._queue:
                self._queue.append(source)
            self._wake.notify_all()

    def close(self) -> None:
        """Ends the threads after the copies they are at."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while True:
            copy = self._next()
            if copy is None:
                return
            copy()

    def _next(self) -> Copy | None:
        with self._wake:
            while not self._closed:
                if not self._queue:
                    self._wake.wait()
                    continue
                source = self._queue.popleft()
                copy = source.take()
                if copy is not None:
                    self._queue.append(source)
                    return copy
        return None
