"""One connection, in the clear or over TLS: never blocks but in `wait`, which `wake` ends from any thread."""

from __future__ import annotations

import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence

from services.kvtransfer.errors import PeerLost, TransportFailed
from services.kvtransfer.transports.tcp.heartbeat import Heartbeat

# The kernel takes no more pieces of memory in one call.
_MOST_VIEWS = 1_024


class Channel:
    """Used by one thread, but for wake. Takes the connected socket over; raises TransportFailed if it cannot.
    Every method raises PeerLost when the connection has ended, failed or fallen silent."""

    def __init__(self, connection: socket.socket, now: Callable[[], float] = time.monotonic) -> None:
        try:
            self._eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        except OSError as error:
            connection.close()
            raise TransportFailed(f"the machine gives no descriptor: {error.strerror}") from None
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection
        self._tls = connection if isinstance(connection, ssl.SSLSocket) else None
        self._heartbeat = Heartbeat(now)
        # Under the lock, so that nobody wakes a descriptor that was closed and is another one by now.
        self._waking = threading.Lock()
        self._poll = select.poll()
        self._poll.register(self._eventfd, select.POLLIN)
        self._poll.register(connection, select.POLLIN)
        self._events = select.POLLIN

    def introduced(self) -> None:
        """The peer has said who it is: from now on it is lost by silence alone."""
        self._heartbeat.introduced()

    def wake(self) -> None:
        """Ends the present or the next wait; any thread, also after close."""
        with self._waking:
            if self._eventfd >= 0:
                os.eventfd_write(self._eventfd, 1)

    def wait(self, *, to_send: bool) -> bool:
        """Until there is something to receive, room to send if that is wanted, a wake or a time to beat. Returns
        whether it is time to beat; only who is not in the middle of a frame may."""
        self._heartbeat.look()
        self._require_peer()
        if self._tls is not None and self._tls.pending():
            return self._heartbeat.due
        events = select.POLLIN | (select.POLLOUT if to_send else 0)
        if events != self._events:
            self._poll.modify(self._socket, events)
            self._events = events
        for descriptor, _ in self._poll.poll(self._heartbeat.wait_s * 1e3 + 1):
            if descriptor == self._eventfd:
                os.eventfd_read(self._eventfd)
        return self._heartbeat.due

    def receive(self, views: Sequence[memoryview]) -> int:
        """Fills views, in order, with what has come; 0 if that is nothing."""
        self._heartbeat.look()
        try:
            if self._tls is not None:
                count = self._tls.recv_into(views[0])
            else:
                count = self._socket.recvmsg_into(views[:_MOST_VIEWS])[0]
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return 0
        except OSError as error:
            raise PeerLost(f"the connection failed: {error}") from None
        if count == 0:
            raise PeerLost("the peer closed the connection")
        self._heartbeat.heard()
        self._require_peer()
        return count

    def send(self, views: Sequence[memoryview]) -> int:
        """Sends what the kernel takes of the views, in order; 0 if that is nothing."""
        try:
            count = self._socket.sendmsg(views[:_MOST_VIEWS]) if self._tls is None else self._tls.send(views[0])
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return 0
        except OSError as error:
            raise PeerLost(f"the connection failed: {error}") from None
        if count:
            self._heartbeat.said()
        return count

    def _require_peer(self) -> None:
        if self._heartbeat.lost:
            raise PeerLost("the peer fell silent, or never said who it is")

    def close(self) -> None:
        """Ends the connection. Again is no error."""
        self._socket.close()
        with self._waking:
            if self._eventfd >= 0:
                os.close(self._eventfd)
                self._eventfd = -1


def advance(views: list[memoryview], count: int) -> None:
    """Drops the first `count` bytes."""
    done = 0
    for view in views:
        if count < len(view):
            break
        count -= len(view)
        done += 1
    del views[:done]
    if count:
        views[0] = views[0][count:]
