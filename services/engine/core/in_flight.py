"""Prefixes that are being computed: known, not readable. Who needs one waits for it instead of computing it again."""

from __future__ import annotations

from collections.abc import Iterable


class InFlightBlocks:
    """Which running sequence will publish a block. Every entry ends with the block landed or the sequence gone."""

    def __init__(self) -> None:
        self._producers: dict[bytes, int] = {}
        self._blocks: dict[int, set[bytes]] = {}

    def announce(self, number: int, blocks: Iterable[bytes]) -> None:
        """Sequence `number` will publish these, apart from those that another one announced first."""
        for block in blocks:
            if self._producers.setdefault(block, number) == number:
                self._blocks.setdefault(number, set()).add(block)

    def landed(self, block: bytes) -> None:
        """The block is readable."""
        number = self._producers.pop(block, None)
        if number is not None:
            self._blocks[number].discard(block)

    def withdraw(self, number: int) -> None:
        """Sequence `number` publishes no more."""
        for block in self._blocks.pop(number, ()):
            del self._producers[block]

    def contains(self, block: bytes) -> bool:
        """Whether a running sequence will publish the block."""
        return block in self._producers
