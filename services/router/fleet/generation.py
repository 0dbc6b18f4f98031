"""A sequence on an engine, as a policy has it: a stream of chunks to read or to hand on whole."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias, TypeVar

from services.protocol.errors import ServiceError
from services.protocol.ranges import TokenRange
from services.router.cost.book import CostBook
from services.router.fleet.info import EngineSnapshot
from services.router.fleet.legs import OpenLeg
from services.router.fleet.member import Member
from services.router.fleet.reservation import Reservation
from services.router.fleet.scope import RequestScope
from services.router.fleet.session import Sequence
from services.router.fleet.underway import Answer, Answering, Computing
from services.router.fleet.watched import Watched
from services.router.request import PolicyRequest
from services.router.values import Chunk, FinishReason, Verb

Result = TypeVar("Result")
# By a policy: chunks of its own, or all of a sequence's.
Yielded: TypeAlias = "Chunk | Generation"


class Generation(AsyncIterator[Chunk]):
    """`async for` gives its chunks. A policy that yields the generation itself hands all of them on: each goes to the
    client in the turn of the event loop in which it came.

    The engine is asked with the first read. Whatever ends a read ends the sequence, and so do aclose() and the
    request's end.
    """

    def __init__(
        self,
        request: PolicyRequest,
        begin: int,
        kv: Reservation | None,
        snapshot: EngineSnapshot,
        member: Member,
        scope: RequestScope,
        costs: CostBook,
    ) -> None:
        """prompt[:begin] comes from `kv`."""
        self._request = request
        self._begin = min(begin, request.num_movable)
        self._kv = kv
        self._snapshot, self._member, self._scope, self._costs = snapshot, member, scope, costs
        self._open = self._running()
        self._sequence: Sequence | None = None
        self._is_read = self._is_closed = self._ended = self._has_token = False

    async def __anext__(self) -> Chunk:
        chunk = None if self._ended else await self._read(Sequence.take)
        if chunk is None:
            self._end()
            raise StopAsyncIteration
        self._count(chunk)
        self._end_if_closed()
        return chunk

    async def each(self, take: Callable[[Chunk], bool]) -> bool:
        """Gives `take` every chunk from now on, as Mailbox.each does: until it says False, or, True, to the end."""

        def counted(chunk: Chunk) -> bool:
            self._count(chunk)
            return take(chunk)

        if self._ended:
            await asyncio.sleep(0)  # a program that hands it on again and again is to keep nobody from their turn
            return True
        is_over = await self._read(lambda sequence: sequence.each(counted))
        if is_over:
            self._end()
        self._end_if_closed()
        return is_over

    async def aclose(self) -> None:
        """Ends the sequence; one that somebody is reading ends with that."""
        self._is_closed = True
        self._end_if_closed()

    def _end_if_closed(self) -> None:
        if self._is_closed and not self._is_read:
            self._end(GeneratorExit())

    async def _read(self, how: Callable[[Sequence], Awaitable[Result]]) -> Result:
        if self._is_read:
            raise RuntimeError("this generation is being read already")
        self._is_read = True
        try:
            if self._sequence is None:
                try:
                    self._sequence = self._open.__enter__()
                except ServiceError as error:
                    self._account().__exit__(type(error), error, None)
                    # A program that tries again at once, and again, is to keep nobody from their turn.
                    await asyncio.sleep(0)
                    raise
            return await how(self._sequence)
        except BaseException as error:
            self._end(error)
            raise
        finally:
            self._is_read = False

    def _account(self) -> OpenLeg:
        tokens = TokenRange(self._begin, len(self._request.prompt))
        return self._scope.legs.begin(Verb.START_GENERATE, self._snapshot.info.name, tokens)

    def _end(self, error: BaseException | None = None) -> None:
        if not self._ended:
            self._ended = True
            if self._sequence is not None:
                kind, trace = (None, None) if error is None else (type(error), error.__traceback__)
                self._open.__exit__(kind, error, trace)

    @contextmanager
    def _running(self) -> Iterator[Sequence]:
        scope, member, request, kv = self._scope, self._member, self._request, self._kv
        if kv is not None:
            kv.check_on(member.address)
            scope.generates(kv)
        with Watched(member, scope) as self._succeeded:
            # First of all: while the account of it is opened, the engine is at work.
            address = kv.kv if kv is not None else None
            sequence = member.client.start_generate(scope.next_call_id(), request, self._begin, address)
            scope.redeem()
            scope.opened(sequence, self._snapshot.info.name)
            member.sequences.add(sequence)
            try:
                self._answer = Answer(self._costs.expected_output(request)) if kv is None else kv.answer
                with (
                    self._account() as self._leg,
                    Answering(member.underway, self._answer),
                    Computing(member.underway, self._to_compute()) as self._prompt_computed,
                ):
                    yield sequence
            finally:
                member.sequences.discard(sequence)
                scope.ended(sequence)

    def _to_compute(self) -> int:
        """How many tokens of the prompt are not cached, if that is cheap to say; else all."""
        request, snapshot, there = self._request, self._snapshot, self._begin
        if request.is_hashed(snapshot.info.page_size):
            there = max(there, min(snapshot.cached_prefix(request), request.num_movable))
        return max(1, len(request.prompt) - there)

    def _count(self, chunk: Chunk) -> None:
        """Before it is handed on: whoever gets the last one may ask for the account at once."""
        if chunk.token_ids:
            self._answer.generated += len(chunk.token_ids)
            if not self._has_token:
                self._first_token()
        if chunk.finish is not None:
            self._leg.end(chunk.timing)
            if chunk.timing is not None:  # else the engine never heard of it
                if self._kv is not None:
                    self._kv.used_up()
                if chunk.finish is not FinishReason.CANCELLED:
                    self._costs.answered(self._request.model.digest, chunk.timing.generated_tokens)

    def _first_token(self) -> None:
        self._has_token = True
        self._leg.first_token()
        self._prompt_computed()
        self._succeeded()
        if self._kv is not None:
            self._kv.in_use()
