"""A pipe whose other end the launcher holds: when it reaches EOF, the launcher is gone, however it died.

PDEATHSIG is no substitute: it follows the parent's thread, not its process.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from services.rpc.errors import StartError


class Lifeline:
    """Watches an inherited descriptor on the running loop and calls `on_lost` once when it ends."""

    def __init__(self, fd: int, on_lost: Callable[[], None]) -> None:
        """StartError if `fd` is not an open descriptor. It belongs to the lifeline from now on."""
        try:
            os.set_blocking(fd, False)
        except OSError:
            raise StartError(f"--lifeline-fd {fd} is not an open descriptor") from None
        # Grandchildren must not keep the pipe.
        os.set_inheritable(fd, False)
        self._fd: int | None = fd
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(fd, self._readable)

    def close(self) -> None:
        """Stops watching."""
        if self._fd is not None:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = None

    def _readable(self) -> None:
        assert self._fd is not None
        try:
            ended = os.read(self._fd, 4096) == b""
        except BlockingIOError:
            return
        except OSError:
            ended = True
        if ended:
            self.close()
            self._on_lost()
