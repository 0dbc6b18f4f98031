"""A bounded buffer between the one who produces chunks and the one who reads them."""

from __future__ import annotations

import asyncio
from collections import deque

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
        self._chunks: deque[Chunk] = deque()
        self._weight = 0
        self._error: ServiceError | None = None
        self._closed = False
        self._waiter: asyncio.Future[None] | None = None

    @property
    def closed(self) -> bool:
        """Whether nothing more will be put in."""
        return self._closed

    def put(self, chunk: Chunk) -> None:
        """Adds a chunk. It is the last one if it overflows; chunks after the end are dropped."""
        if self._closed:
            return
        self._chunks.append(chunk)
        self._weight += chunk.weight
        if self._weight > self._max_weight:
            self.close(SlowConsumer(f"more than {self._max_weight} tokens wait for their reader"))
        self._wake()

    def close(self, error: ServiceError | None = None) -> None:
        """Ends it; the consumer gets what is left, then the error, or None. The first close counts."""
        if not self._closed:
            self._closed, self._error = True, error
            self._wake()

    async def take(self) -> Chunk | None:
        """What is there, as one chunk of bounded size; waits for some. None after the end.

        Raises what it was closed with. Cancelling loses nothing.
        """
        while not self._chunks:
            if self._closed:
                if self._error is not None:
                    raise self._error
                return None
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
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
