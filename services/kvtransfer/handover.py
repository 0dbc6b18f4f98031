"""The unix socket over which descriptors pass to engines that show a ticket."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass

from services.kvtransfer.errors import KvTransferError
from services.kvtransfer.liveness import EngineConnection, peer_of
from services.rpc.fd_passing import FdPassingError, Message, receive_message, to_address

log = logging.getLogger(__name__)

TICKET_SECONDS = 10.0
_BACKLOG = 64
REOPEN_SECONDS = 0.5

# What is done with a good ticket's connection and the descriptors that came with it. It takes both over, unless it
# raises KvTransferError: then the connection is closed, and it has closed the descriptors.
Accept = Callable[[EngineConnection, Message], None]


@dataclass(frozen=True, slots=True)
class _Invitation:
    accept: Accept
    expiry: asyncio.TimerHandle


class HandoverSocket:
    """Listens under a random abstract name, so that nothing is left behind in any folder."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.path = f"@microserve-kvtransfer-{secrets.token_hex(16)}"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self._listener.bind(to_address(self.path))
        self._listener.listen(_BACKLOG)
        self._reopening: asyncio.TimerHandle | None = None
        self._open()
        self._invitations: dict[bytes, _Invitation] = {}
        self._strangers: dict[socket.socket, asyncio.TimerHandle] = {}

    def invite(self, accept: Accept) -> bytes:
        """A ticket for one connection within ten seconds."""
        ticket = secrets.token_bytes(32)
        expiry = self._loop.call_later(TICKET_SECONDS, self.withdraw, ticket)
        self._invitations[ticket] = _Invitation(accept, expiry)
        return ticket

    def withdraw(self, ticket: bytes) -> None:
        """Makes a ticket worthless; one that is used up or expired is already."""
        invitation = self._invitations.pop(ticket, None)
        if invitation is not None:
            invitation.expiry.cancel()

    def close(self) -> None:
        """Stops listening. Connections that were handed on stay open."""
        if self._reopening is not None:
            self._reopening.cancel()
        self._loop.remove_reader(self._listener)
        self._listener.close()
        for ticket in tuple(self._invitations):
            self.withdraw(ticket)
        for connection in tuple(self._strangers):
            self._dismiss(connection)

    def _open(self) -> None:
        self._loop.add_reader(self._listener, self._incoming)

    def _incoming(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            # Out of descriptors, usually. The caller still waits in the queue, so that the loop would be told for ever.
            log.error("no engine can be let in", extra={"fields": {"why": error.strerror}})
            self._loop.remove_reader(self._listener)
            self._reopening = self._loop.call_later(REOPEN_SECONDS, self._open)
            return
        # An abstract name has no permissions. The ticket is the proof; other users need not even try.
        if peer_of(connection)[1] not in (0, os.geteuid()):
            connection.close()
            return
        connection.setblocking(False)
        self._strangers[connection] = self._loop.call_later(TICKET_SECONDS, self._dismiss, connection)
        self._loop.add_reader(connection, self._introduced, connection)

    def _introduced(self, connection: socket.socket) -> None:
        try:
            message = receive_message(connection)
        except BlockingIOError:
            return
        except (OSError, FdPassingError):
            self._dismiss(connection)
            return
        invitation = self._invitations.get(message.payload)
        self.withdraw(message.payload)
        self._strangers.pop(connection).cancel()
        self._loop.remove_reader(connection)
        engine = EngineConnection(connection)
        if invitation is None:
            message.close()
            self._refuse(engine, "unknown or used ticket")
            return
        try:
            invitation.accept(engine, message)
        except KvTransferError as error:
            self._refuse(engine, error.message)

    def _refuse(self, engine: EngineConnection, why: str) -> None:
        fields = {"process": engine.process_id, "why": why}
        log.warning("handover refused", extra={"fields": fields})
        engine.close()

    def _dismiss(self, connection: socket.socket) -> None:
        self._strangers.pop(connection).cancel()
        self._loop.remove_reader(connection)
        connection.close()
