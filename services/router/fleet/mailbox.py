"""A bounded buffer between the one who produces chunks and the one who reads them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from services.protocol.errors import ServiceError
from services.router.errors import SlowConsumer
from services.router.values import Chunk, merge

# A chunk becomes one message to the client, and messages have a largest size.
MAX_MERGED_WEIGHT = 1024


class Mailbox:
    """One producer that never waits, one consumer that does.

    What piles up while the consumer is busy comes out merged into one chunk, so a slow consumer gets fewer and larger
    chunks. More than `max_weight` of it (see Chunk.weight) fails the consumer with SLOW_CONSUMER.
    """

    def __init__(self, max_weight: int) -> None:
        self._max_weight = max_weight
        self._loop = asyncio.get_running_loop()
        self._chunks: deque[Chunk] = deque()
        self._weight = 0
        self._error: Exception | None = None
        self._closed = False
        self.has_begun = False  # something has been put in
        self._give_to: Callable[[Chunk], bool] | None = None  # while a consumer takes chunks as they are put in
        self._waiter: asyncio.Future[None] | None = None

    @property
    def closed(self) -> bool:
        """Whether nothing more will be put in."""
        return self._closed

    def put(self, chunk: Chunk) -> None:
        """Adds a chunk. It is the last one if it overflows; chunks after the end are dropped."""
        if self._closed:
            return
        self.has_begun = True
        if self._give_to is not None:
            self._give(chunk, self._give_to)
            return
        self._chunks.append(chunk)
        self._weight += chunk.weight
        if self._weight > self._max_weight:
            self.close(SlowConsumer(f"more than {self._max_weight} tokens wait for their reader"))
        self._wake()

    def close(self, error: ServiceError | None = None) -> None:
        """Ends it; the consumer gets what is left, then the error, or None. The first close counts."""
        self._close(error)

    def _close(self, error: Exception | None) -> None:
        if not self._closed:
            self._closed, self._error = True, error
            self._wake()

    async def take(self) -> Chunk | None:
        """What is there, as one chunk of bounded size; waits for some. None after the end.

        Raises what it was closed with. Cancelling loses nothing.
        """
        while not self._chunks:
            if self._has_ended():
                return None
            await self._change()
        return self._next()

    async def each(self, take: Callable[[Chunk], bool]) -> bool:
        """Gives `take` what is there, and from then on every chunk as it is put in, by the one who puts it in and with
        no turn of the event loop in between, until it says False: it has taken that one and wants no more for now.
        True: nothing more comes.

        Raises what it was closed with, or what `take` raised, which closes it. Cancelling loses nothing.
        """
        while self._chunks:
            try:
                wants_more = take(self._next())
            except Exception as error:
                self._close(error)
                raise
            if not wants_more:
                return False
        if self._has_ended():
            return True
        self._give_to = take
        try:
            await self._change()
            return self._give_to is not None and self._has_ended()
        finally:
            self._give_to = None

    def _give(self, chunk: Chunk, take: Callable[[Chunk], bool]) -> None:
        try:
            if not take(chunk):
                self._give_to = None
                self._wake()
        except Exception as error:  # the consumer's, so it is not to be raised here
            self._close(error)

    def _has_ended(self) -> bool:
        """Raises what it was closed with."""
        if self._error is not None:
            raise self._error
        return self._closed

    async def _change(self) -> None:
        """Waits for something to do."""
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _next(self) -> Chunk:
        if len(self._chunks) == 1:
            self._weight = 0
            return self._chunks.popleft()
        taken = [self._chunks.popleft()]
        weight = taken[0].weight
        while self._chunks and weight + self._chunks[0].weight <= MAX_MERGED_WEIGHT:
            taken.append(self._chunks.popleft())
            weight += taken[-1].weight
        self._weight -= weight
        return merge(taken)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
