"""Prefixes that are being computed or received: known, not readable."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, TypeVar

Producer = TypeVar("Producer", int, str)  # a running sequence's number, or the id of a reservation


class InFlightBlocks(Generic[Producer]):
    """Who will publish a block. Every entry ends with the block landed or the producer gone."""

    def __init__(self) -> None:
        self._producers: dict[bytes, Producer] = {}
        self._blocks: dict[Producer, set[bytes]] = {}

    def announce(self, producer: Producer, blocks: Iterable[bytes]) -> None:
        """`producer` will publish these, apart from those that another one announced first."""
        for block in blocks:
            if self._producers.setdefault(block, producer) == producer:
                self._blocks.setdefault(producer, set()).add(block)

    def landed(self, block: bytes) -> None:
        """The block is readable."""
        producer = self._producers.pop(block, None)
        if producer is not None:
            self._blocks[producer].discard(block)

    def withdraw(self, producer: Producer) -> None:
        """`producer` publishes no more."""
        for block in self._blocks.pop(producer, ()):
            del self._producers[block]

    def contains(self, block: bytes) -> bool:
        """Whether somebody will publish the block."""
        return block in self._producers
