"""Whether an engine is alive: its socket and its process are watched, and the first to end tells."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import struct
from collections.abc import Callable

_CREDENTIALS = struct.Struct("3i")


class EngineConnection:
    """The socket over which an engine fetched its pool. `on_gone` is called once, on the loop, when it ends.

    The socket ends when the engine closes it or dies. A process that the engine forked may keep the socket open, so
    the engine's own process is watched as well.
    """

    def __init__(self, connection: socket.socket) -> None:
        """Takes the socket over."""
        self.socket = connection
        self.process_id, _ = peer_of(connection)
        self._pidfd = _open_process(self.process_id)
        self._on_gone: Callable[[], None] | None = None
        self._loop = asyncio.get_running_loop()

    def watch(self, on_gone: Callable[[], None]) -> None:
        """Begins to watch."""
        self._on_gone = on_gone
        self._loop.add_reader(self.socket, self._check)
        if self._pidfd is not None:
            self._loop.add_reader(self._pidfd, self._check)

    def is_gone(self) -> bool:
        """Whether the engine is gone by now, perhaps before the loop came to see it."""
        if self.socket.fileno() < 0:
            return True
        if self._pidfd is not None and _is_readable(self._pidfd):
            return True
        try:
            # An engine sends nothing after its ticket; whatever comes is dropped.
            return self.socket.recv(64, socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        """Ends the connection without a call to on_gone. Again is no error."""
        self._on_gone = None
        if self.socket.fileno() >= 0:
            self._loop.remove_reader(self.socket)
            self.socket.close()
        if self._pidfd is not None:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None

    def _check(self) -> None:
        if self._on_gone is not None and self.is_gone():
            on_gone = self._on_gone
            self.close()
            on_gone()


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """Process id, as this process sees it (0: not at all), and user id at the other end of a unix socket."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    process_id, user_id, _ = _CREDENTIALS.unpack(raw)
    return process_id, user_id


def _open_process(process_id: int) -> int | None:
    """A pidfd, or None where the process is out of sight (another pid namespace) or over: the socket tells then."""
    if process_id <= 0:
        return None
    try:
        return os.pidfd_open(process_id)
    except OSError:
        return None


def _is_readable(descriptor: int) -> bool:
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    return bool(poller.poll(0))
