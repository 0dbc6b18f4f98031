"""Buffers that fetched bytes land in before they are copied into pages.

They stand between the network and the pool: what arrives late lands in a buffer, never in a page.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

B = TypeVar("B")


class Slots(Generic[B]):
    """Buffers of one size, made as they are needed, `limit` at most. Belongs to the running loop."""

    def __init__(self, make: Callable[[], B], limit: int) -> None:
        self._make = make
        self._limit = limit
        self._left = asyncio.Semaphore(limit)
        self._free: list[B] = []
        # Kept, so that their memory goes to nobody else.
        self._lost: list[B] = []

    @property
    def are_spent(self) -> bool:
        """Whether every buffer is lost: nothing can be fetched any more."""
        return len(self._lost) == self._limit

    async def take(self) -> B:
        """A buffer; waits while all are in use. Cancelling takes none."""
        await self._left.acquire()
        if self._free:
            return self._free.pop()
        try:
            return self._make()
        except BaseException:
            self._left.release()
            raise

    def give_back(self, buffer: B) -> None:
        """Nothing writes into it any more."""
        self._free.append(buffer)
        self._left.release()

    def lose(self, buffer: B) -> None:
        """Something may write into it at any time: it is never used again."""
        self._lost.append(buffer)
