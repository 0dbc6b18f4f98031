"""What one request holds on engines, so that nothing of it outlives the request."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable
from typing import Protocol

from services.protocol.ranges import TokenRange
from services.router.cleanup import Cleanup
from services.router.errors import PolicyFailed
from services.router.fleet.legs import Legs
from services.router.fleet.member import Member
from services.router.fleet.reservation import Reservation
from services.router.fleet.session import Sequence
from services.router.fleet.underway import Pledge, Underway
from services.router.values import Verb

_CALL_NUMBERS = itertools.count(1)


class Stream(Protocol):
    """Chunks that somebody may read."""

    async def aclose(self) -> None:
        """Ends what it reads, unless somebody waits for a chunk: then it ends with that."""


class Calls(Protocol):
    """Hears what the request's program calls."""

    def sends(self, kv: Reservation, tokens: TokenRange) -> Callable[[], None]:
        """A send was called; what comes back is to be called when it begins, and kept by nobody else."""

    def generates(self, kv: Reservation) -> None:
        """A sequence is about to wait for this reservation to be filled. PolicyFailed if it would for ever."""


class RequestScope:
    """Registers reservations and sequences from their beginning to their end, and ends what a policy left open."""

    def __init__(self, cleanup: Cleanup) -> None:
        self.cleanup = cleanup
        self.legs = Legs()
        self.calls: Calls | None = None
        self.avoided: set[str] = set()  # addresses of engines that failed this request
        self._reservations: set[Reservation] = set()
        self._sequences: dict[Sequence, str] = {}  # with the names of their engines
        self._streams: list[Stream] = []
        self._members: set[Member] = set()
        self._pledge: Pledge | None = None
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

    def pledge(self, underway: Underway, num_tokens: int) -> None:
        """An engine was chosen to compute so many tokens of the prompt: they count there until the program asks for
        them, or for something else, so that the next request does not find it idle."""
        self.redeem()
        if not self._closed:
            self._pledge = Pledge(underway, num_tokens)

    def redeem(self) -> None:
        """The program asks for them now, and they count as asked; or it chooses again."""
        if self._pledge is not None:
            self._pledge.over()
            self._pledge = None

    def opened(self, sequence: Sequence, engine: str) -> None:
        """Registers a sequence on the engine of that name."""
        self._sequences[sequence] = engine

    def ended(self, sequence: Sequence) -> None:
        """Cancels a sequence that has not ended, and forgets it."""
        sequence.cancel()
        self._sequences.pop(sequence, None)

    def sends(self, kv: Reservation, tokens: TokenRange) -> Callable[[], None]:
        """See Calls."""
        return (lambda: None) if self.calls is None else self.calls.sends(kv, tokens)

    def generates(self, kv: Reservation) -> None:
        """See Calls."""
        if self.calls is not None:
            self.calls.generates(kv)

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
        self.redeem()
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
