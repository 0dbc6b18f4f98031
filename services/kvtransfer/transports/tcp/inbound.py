"""The receiving end of one connection: frames in, bytes straight into the pages that they were granted."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import numpy as np
from microserve.kvtransfer.v1 import data_pb2 as pb
from numpy.typing import NDArray

from services.kvtransfer.errors import ChecksumMismatch, PeerLost, ProtocolViolation
from services.kvtransfer.landing import Landing, Landings, check_convertible
from services.kvtransfer.pool import Pool, PoolShape
from services.kvtransfer.transports.base import PEER_VERSION
from services.kvtransfer.transports.tcp.channel import Channel
from services.kvtransfer.transports.tcp.connection import Connection
from services.kvtransfer.transports.tcp.inbound_put import InboundPut
from services.kvtransfer.transports.tcp.statement import Statement, challenge_of
from services.kvtransfer.transports.tcp.wire import Header, Kind, decode_message, encode_error, encode_message
from services.protocol.errors import AttemptSuperseded, ReservationGone, ServiceError, StaleEpoch
from services.protocol.extents import ModelPart
from services.protocol.grants import AlreadyCommitted, Attempt
from services.protocol.ranges import TokenRange

log = logging.getLogger(__name__)

_CHALLENGE_BYTES = 16
_MOST_PUTS = 1_024
_REFUSED = (ReservationGone, AttemptSuperseded, ChecksumMismatch)


class Reception:
    """What all connections to this service share. Belongs to the loop."""

    def __init__(self, landings: Landings, epoch: bytes, *, checksums: bool) -> None:
        self.landings = landings
        self.epoch = epoch
        self.checksums = checksums
        self.loop = asyncio.get_running_loop()
        self._attempts: dict[Attempt, Inbound] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def claim(self, landing: Landing, connection: Inbound) -> bool:
        """An attempt lives on the connection that it began on, so its frames come in order and its loss is certain.
        Returns whether that is this one."""
        self._forget_ended()
        return self._attempts.setdefault(landing.attempt, connection) is connection

    def needed(self) -> set[Inbound]:
        """The connections that attempts live on."""
        self._forget_ended()
        return set(self._attempts.values())

    def lost(self, connection: Inbound) -> None:
        """Nothing is written through the connection any more: its attempts end."""
        for attempt in [a for a, c in self._attempts.items() if c is connection]:
            del self._attempts[attempt]
            self.run(self.landings.drop(attempt))

    def _forget_ended(self) -> None:
        self._attempts = {a: c for a, c in self._attempts.items() if not (a.fenced or a.committed)}

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """In the background."""
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Returns when nothing is under way."""
        await asyncio.gather(*self._tasks, return_exceptions=True)


class Inbound(Connection):
    """One connection from another service."""

    def __init__(
        self,
        name: str,
        reception: Reception,
        make_channel: Callable[[], Channel],
        on_end: Callable[[Inbound], None],
    ) -> None:
        """`make_channel` may block as long as a handshake does; `on_end` is called on the loop."""
        super().__init__(name)
        self._reception = reception
        self._make_channel = make_channel
        self._on_end = on_end
        self._challenge = secrets.token_bytes(_CHALLENGE_BYTES)
        # When the peer last wanted something, by time.monotonic; None: it is a stranger still.
        self.used_s: float | None = None
        self._puts: dict[int, InboundPut] = {}
        self._unanswered = 0

    def connect(self) -> Channel:
        """See Connection."""
        return self._make_channel()

    def serve(self) -> None:
        """See Connection."""
        self._welcome(self.read_header())
        while True:
            self.used_s = time.monotonic()
            header = self.read_header()
            if header.kind is Kind.PUT:
                self._put(header)
            elif header.kind is Kind.DISCARD:
                self.discard(header.length)
            elif header.kind is Kind.MESSAGE:
                self._message(header.number, decode_message(self.read(header.length)))
            else:
                raise ProtocolViolation(f"a frame {header.kind.name} of whoever connected")

    def ended(self, error: ServiceError) -> None:
        """See Connection."""
        level = logging.INFO if isinstance(error, PeerLost) else logging.WARNING
        log.log(level, "connection ended", extra={"fields": {"connection": self.name, "why": error.message}})
        if not isinstance(error, PeerLost):
            self._farewell(error)
        puts, self._puts = self._puts, {}
        for put in puts.values():
            put.close()
        self._on_loop(lambda: self._after(tuple(puts.values())))

    def _farewell(self, error: ServiceError) -> None:
        """Tells the peer why, if it can be told at once."""
        if self._channel is not None and not self._sending:
            with contextlib.suppress(PeerLost):
                self._channel.send([memoryview(encode_error(0, error))])

    def _after(self, puts: tuple[InboundPut, ...]) -> None:
        for put in puts:
            put.listening.close()
        self._reception.lost(self)
        self._on_end(self)

    def _welcome(self, header: Header) -> None:
        if header.kind is not Kind.MESSAGE:
            raise ProtocolViolation("the first frame is no hello")
        hello = decode_message(self.read(header.length)).hello
        if hello.peer_version != PEER_VERSION:
            raise ProtocolViolation(f"version {hello.peer_version} in place of {PEER_VERSION}")
        if hello.target_epoch != self._reception.epoch:
            raise StaleEpoch("the connection is meant for another incarnation of the service")
        self.introduced()
        self.say(encode_message(0, pb.DataMessage(welcome=pb.Welcome(challenge=self._challenge))))

    # --- frames ---

    def _put(self, header: Header) -> None:
        put = self._puts.get(header.number)
        if put is None:
            raise ProtocolViolation("a frame of a put that is not open")
        frame = put.take(header)
        if put.failure is not None:
            return self.discard(header.length)
        direct = put.pages_in_place(header.layer, frame)
        if direct is not None:
            self._receive_in_place(put, header, frame, *direct)
        else:
            buffer = np.empty(header.length, np.uint8)
            self.fill([buffer.data])
            self._scatter(put, header, frame, buffer)
        if put.failure is None:
            self._outbox.append(Header(Kind.LANDED, header.number, header.layer, header.begin, header.end).encode())
        return None

    def _receive_in_place(
        self, put: InboundPut, header: Header, frame: TokenRange, pool: Pool, views: list[memoryview]
    ) -> None:
        """Fills the pages themselves. The gate admits every piece; once the attempt is fenced the rest goes nowhere."""

        def receive(left: list[memoryview]) -> int:
            # Never blocks, so that a fence waits for a copy out of the kernel, and not for the network.
            return self._write(put, frame, pool, lambda: self.receive(left))

        left = list(views)
        try:
            while left:
                self.fill_some(left, receive)
            if put.checksum:
                self._write(put, frame, pool, lambda: put.check(header, views))
        except _REFUSED as error:
            self._fail(put, error)
            self.discard(sum(map(len, left)))

    def _scatter(self, put: InboundPut, header: Header, frame: TokenRange, buffer: NDArray[np.uint8]) -> None:
        try:
            put.check(header, [buffer.data])
            for pool, write in put.writes(header.layer, frame, buffer):
                self._write(put, frame, pool, write)
        except _REFUSED as error:
            self._fail(put, error)

    def _write(self, put: InboundPut, frame: TokenRange, pool: Pool, write: Callable[[], int]) -> int:
        """Calls `write` if the gate admits it; both return the number of bytes written. Raises what fenced it."""
        put.landing.begin_write(frame)
        count = 0
        try:
            count = write()
        finally:
            put.landing.end_write(pool, count)
        return count

    def _fail(self, put: InboundPut, error: ServiceError) -> None:
        """The first failure is told, at once."""
        if put.failure is not None:
            return
        put.failure = error
        put.close()
        self._outbox.append(encode_error(put.number, error))

    # --- messages ---

    def _message(self, number: int, message: pb.DataMessage) -> None:
        kind = message.WhichOneof("content")
        if kind == "open":
            if number in self._puts or len(self._puts) >= _MOST_PUTS:
                raise ProtocolViolation("a put whose number is in use, or one too many")
            self._answer(number, self._open(number, message.open))
        elif kind == "finish":
            put = self._puts.get(number)
            if put is None or (put.failure is None and not put.complete):
                raise ProtocolViolation("a put that is not whole is said to be finished")
            self._answer(number, self._finish(put))
        elif kind == "end_attempt":
            self._answer(number, self._end_attempt(number, message.end_attempt))
        elif kind == "close":
            self._close_put(number)
        elif kind == "probe":
            self._outbox.append(encode_message(number, pb.DataMessage(probed=pb.Probed())))
        else:
            raise ProtocolViolation(f"a message {kind} of whoever connected")

    def _close_put(self, number: int) -> None:
        put = self._puts.pop(number, None)
        if put is not None:
            put.close()
            self._on_loop(put.listening.close)

    def _answer(self, number: int, work: Coroutine[Any, Any, pb.DataMessage]) -> None:
        if self._unanswered >= _MOST_PUTS:
            work.close()
            raise ProtocolViolation("more requests at once than there can be puts")
        self._unanswered += 1
        self._on_loop(lambda: self._reception.run(self._answered(number, work)))

    async def _answered(self, number: int, work: Coroutine[Any, Any, pb.DataMessage]) -> None:
        try:
            self.say(encode_message(number, await work))
        except ServiceError as error:
            self.say(encode_error(number, error))
        finally:
            self.submit(self._was_answered)

    def _was_answered(self) -> None:
        self._unanswered -= 1

    async def _open(self, number: int, message: pb.ProvedStatement) -> pb.DataMessage:
        statement = self._admit(number, message)
        landing = await self._reception.landings.open(
            statement.address, statement.claim, statement.part, statement.extent
        )
        if isinstance(landing, AlreadyCommitted):
            return pb.DataMessage(opened=pb.PutOpened(already_committed=True))
        if not self._reception.claim(landing, self):
            await self._reception.landings.drop(landing.attempt)
            raise AttemptSuperseded("the attempt began on another connection")
        checksum = statement.checksum or self._reception.checksums
        put = InboundPut(number, landing, statement.source_layout, checksum=checksum)
        put.listening.enter_context(landing.fence_listener(lambda: self._fenced(put)))
        if not self.submit(lambda: self._admitted(put)):
            put.listening.close()
            self._reception.lost(self)
            raise PeerLost("the connection ended meanwhile")
        return pb.DataMessage(opened=pb.PutOpened(checksum=checksum, verbatim=put.verbatim))

    def _admitted(self, put: InboundPut) -> None:
        self._puts[put.number] = put

    async def _finish(self, put: InboundPut) -> pb.DataMessage:
        if put.failure is not None:
            raise put.failure
        return pb.DataMessage(finished=pb.PutFinished(committed=put.landing.mark_in_place()))

    async def _end_attempt(self, number: int, message: pb.ProvedStatement) -> pb.DataMessage:
        statement = self._admit(number, message)
        committed = await self._reception.landings.end(statement.address, statement.claim)
        return pb.DataMessage(ended=pb.AttemptEnded(committed=committed))

    def _admit(self, number: int, message: pb.ProvedStatement) -> Statement:
        """The statement, proved. Raises what Statement.decode and Landings.admit raise, and LayoutMismatch."""
        statement = Statement.decode(message.statement)
        challenge = challenge_of(self._challenge, number, message.statement)
        address = self._reception.landings.admit(statement.address, challenge, message.proof)
        source = PoolShape(statement.source_layout, 1, ModelPart(statement.extent, address.whole))
        check_convertible(source, address)
        return replace(statement, address=address)

    def _fenced(self, put: InboundPut) -> None:
        """Tells the sender at once, and not only with its next frame."""
        error = put.landing.refusal()
        if error is not None:
            self.submit(lambda: self._fail(put, error))

    def _on_loop(self, call: Callable[[], object]) -> None:
        self._reception.loop.call_soon_threadsafe(call)
