"""Which engines have a block cached: the same knowledge as every engine's CachedBlocks, asked the other way round.

Engines are bits of an integer: what one of a thousand engines has is found without asking each of them.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable


class BlockIndex:
    """Blocks of all engines. An engine has a slot, the number of its bit, for as long as the router follows it."""

    def __init__(self) -> None:
        self._holders: dict[bytes, int] = {}
        self._num_slots = 0
        self._free: list[int] = []

    def __len__(self) -> int:
        """Blocks that at least one engine has."""
        return len(self._holders)

    def open(self) -> int:
        """A slot for one more engine, the lowest that is free; close() gives it back."""
        if self._free:
            return heapq.heappop(self._free)
        self._num_slots += 1
        return self._num_slots - 1

    def close(self, slot: int) -> None:
        """Its engine is not followed any more; all its blocks have been discarded."""
        heapq.heappush(self._free, slot)

    def add(self, slot: int, blocks: Iterable[bytes]) -> None:
        """An engine has these, perhaps some of them already."""
        holders, bit = self._holders, 1 << slot
        for block in blocks:
            holders[block] = holders.get(block, 0) | bit

    def discard(self, slot: int, blocks: Iterable[bytes]) -> None:
        """An engine has these no more, or never had them."""
        holders, others = self._holders, ~(1 << slot)
        for block in blocks:
            left = holders.get(block, 0) & others
            if left:
                holders[block] = left
            else:
                holders.pop(block, None)

    def holders(self, block: bytes) -> int:
        """Bits of the engines that have it."""
        return self._holders.get(block, 0)
