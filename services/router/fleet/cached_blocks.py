"""Which blocks an engine has cached, from its event stream."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from services.router.fleet.block_index import BlockIndex


@dataclass(frozen=True, slots=True)
class KvEvent:
    """One batch of changes; engine.v1.WatchKvEventsResponse has the rules."""

    sequence: int
    snapshot: bool = False
    snapshot_complete: bool = False
    stored: tuple[bytes, ...] = ()
    removed: tuple[bytes, ...] = ()


class CachedBlocks:
    """A set of block hashes. What it says is advice: the engine decides what matches when a verb comes."""

    def __init__(self, index: BlockIndex | None = None) -> None:
        """`index` is told of every block, under `slot`; by default one of its own."""
        self._index = BlockIndex() if index is None else index
        self.slot = self._index.open()
        self._blocks: set[bytes] = set()
        self._incoming: set[bytes] = set()
        self._next_sequence: int | None = None

    def __len__(self) -> int:
        return len(self._blocks)

    def longest_prefix(self, hashes: Sequence[bytes]) -> int:
        """How many blocks from the first one on are cached.

        An engine gives up a block only after all that follow it, so cached ones come first and bisecting finds the
        end. While a batch of removals is half known the answer may be too long or too short; advice may.
        """
        return bisect_left(hashes, True, key=lambda each: each not in self._blocks)

    def apply(self, event: KvEvent) -> bool:
        """Takes in an event; False if one was missed and a new stream with a new snapshot is needed.

        The old state is kept until a snapshot is complete: half of a snapshot knows less.
        """
        if event.snapshot:
            self._incoming.update(event.stored)
            if event.snapshot_complete:
                self._index.discard(self.slot, self._blocks - self._incoming)
                self._index.add(self.slot, self._incoming - self._blocks)
                self._blocks, self._incoming = self._incoming, set()
                self._next_sequence = event.sequence + 1
            return True
        if event.sequence != self._next_sequence:
            self.resync()
            return False
        self._next_sequence += 1
        self._blocks.difference_update(event.removed)
        self._index.discard(self.slot, event.removed)
        self._blocks.update(event.stored)
        self._index.add(self.slot, event.stored)
        return True

    def resync(self) -> None:
        """A new stream begins: the next event must be a snapshot."""
        self._incoming = set()
        self._next_sequence = None

    def clear(self) -> None:
        """The engine began anew with an empty cache."""
        self._index.discard(self.slot, self._blocks)
        self._blocks = set()
        self.resync()

    def close(self) -> None:
        """The engine is not followed any more; nothing may be called after."""
        self.clear()
        self._index.close(self.slot)
