"""Messages with file descriptors over a unix SOCK_SEQPACKET socket.

A sequenced-packet socket keeps message boundaries and still tells when the other end is gone, so one message is one
step of a handshake and an empty read is death.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

MAX_MESSAGE_BYTES = 4096
MAX_DESCRIPTORS = 8


class FdPassingError(Exception):
    """The other end is gone or sent something that is not a message of this protocol."""


@dataclass(frozen=True, slots=True)
class Message:
    """What came in one packet. The receiver owns the descriptors; they are closed on exec."""

    payload: bytes
    descriptors: tuple[int, ...]

    def close(self) -> None:
        """Closes the descriptors of a message that nobody wants."""
        close_descriptors(self.descriptors)


def close_descriptors(descriptors: Sequence[int]) -> None:
    """Closes descriptors; one that is closed already is no error."""
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def to_address(path: str) -> str:
    """A socket path as shown to people (@ for the abstract namespace) as the kernel wants it."""
    return "\0" + path[1:] if path.startswith("@") else path


def send_message(connection: socket.socket, payload: bytes, descriptors: Sequence[int] = ()) -> None:
    """Sends one packet. The sender keeps its descriptors. Raises OSError as send does."""
    socket.send_fds(connection, [payload], list(descriptors))


def receive_message(connection: socket.socket) -> Message:
    """Receives one packet.

    Raises FdPassingError when the other end is gone or the packet was cut short, BlockingIOError and TimeoutError
    as the socket does.
    """
    space = socket.CMSG_SPACE(MAX_DESCRIPTORS * array.array("i").itemsize)
    # MSG_CMSG_CLOEXEC: Python makes its own descriptors non-inheritable, but not those that arrive this way.
    payload, ancillary, flags, _ = connection.recvmsg(MAX_MESSAGE_BYTES, space, socket.MSG_CMSG_CLOEXEC)
    descriptors = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    message = Message(payload, tuple(descriptors))
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        message.close()
        raise FdPassingError("a packet was cut short")
    if not payload:
        message.close()
        raise FdPassingError("the other end closed the connection")
    return message
