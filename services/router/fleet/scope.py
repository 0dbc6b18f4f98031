"""What one request holds on engines, so that nothing of it outlives the request."""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Protocol

from services.router.cleanup import Cleanup
from services.router.errors import PolicyFailed
from services.router.fleet.legs import Legs
from services.router.fleet.member import Member
from services.router.fleet.reservation import Reservation
from services.router.fleet.session import Sequence
from services.router.values import Verb

_CALL_NUMBERS = itertools.count(1)


class Stream(Protocol):
    """Chunks that somebody may read."""

    async def aclose(self) -> None:
        """Ends what it reads, unless somebody waits for a chunk: then it ends with that."""


class Unawaited:
    """An argument of a verb's coroutine, which takes it along when it is dropped before it began: that tells of the
    `await` that a program forgot."""

    __slots__ = ("_scope", "_verb", "begun")

    def __init__(self, scope: RequestScope, verb: Verb) -> None:
        self._scope, self._verb, self.begun = scope, verb, False

    def __del__(self) -> None:
        if not self.begun:
            self._scope.on_dropped(self._verb, sys._getframe(1))


class RequestScope:
    """Registers reservations and sequences from their beginning to their end, and ends what a policy left open."""

    # A verb was dropped before it began, in that frame: a program's, or that of who cancels its task.
    on_dropped: Callable[[Verb, FrameType], None] = staticmethod(lambda verb, frame: None)

    def __init__(self, cleanup: Cleanup) -> None:
        self.cleanup = cleanup
        self.legs = Legs()
        self.avoided: set[str] = set()  # addresses of engines that failed this request
        self._reservations: set[Reservation] = set()
        self._sequences: dict[Sequence, str] = {}  # with the names of their engines
        self._streams: list[Stream] = []
        self._members: set[Member] = set()
        self._closed = False

    def next_call_id(self) -> str:
        """A request id for one verb, unique in this process. Not the client's name for the request: clients repeat
        themselves, and an engine must not be told so."""
        return str(next(_CALL_NUMBERS))

    def use(self, member: Member) -> None:
        """An engine is called: it is not let go before the request is over. PolicyFailed if it is over, for a program
        that was left behind still runs; EngineLost if the engine has been let go already."""
        if self._closed:
            raise PolicyFailed("the request is over")
        if member not in self._members:
            member.begin_use()
            self._members.add(member)

    async def hold(self, reservation: Reservation) -> None:
        """Registers a reservation. PolicyFailed, and it is released, if the request is over."""
        if self._closed:
            await reservation.release()
            raise PolicyFailed("the request is over")
        self._reservations.add(reservation)

    async def let_go(self, reservation: Reservation) -> None:
        """Releases what was held, if it was not used up."""
        self._reservations.discard(reservation)
        await reservation.release()

    def opened(self, sequence: Sequence, engine: str) -> None:
        """Registers a sequence on the engine of that name."""
        self._sequences[sequence] = engine

    def ended(self, sequence: Sequence) -> None:
        """Cancels a sequence that has not ended, and forgets it."""
        sequence.cancel()
        self._sequences.pop(sequence, None)

    def stream(self, chunks: Stream) -> None:
        """Registers a stream of chunks, so that it is closed even where a program forgets it half-read."""
        self._streams.append(chunks)

    def cancel_sequences(self) -> None:
        """Tells the engines to stop; each sequence still gives its last output."""
        for sequence in self._sequences:
            sequence.cancel()

    async def close(self) -> str:
        """Ends everything still open, and names it as in "prep_recv on a, 2 start_generate on b"; empty if there was
        nothing. Nothing can be begun after."""
        self._closed = True
        try:
            return await self.end_all()
        finally:
            while self._members:
                self._members.pop().end_use()

    async def end_all(self) -> str:
        """As close, but the request goes on."""
        left = self._open()
        self.cancel_sequences()
        streams, self._streams = self._streams, []
        for chunks in streams:
            await chunks.aclose()
        if self._reservations:
            await asyncio.gather(*(self.let_go(reservation) for reservation in tuple(self._reservations)))
        return left

    def _open(self) -> str:
        """The verbs that began what is open, with their engines."""
        verbs = Counter(f"{Verb.PREP_RECV.value} on {each.receiver.info.name}" for each in self._reservations)
        verbs.update(f"{Verb.START_GENERATE.value} on {engine}" for engine in self._sequences.values())
        return ", ".join(what if count == 1 else f"{count} {what}" for what, count in sorted(verbs.items()))
