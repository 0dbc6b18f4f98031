"""The prefix cache as a list that is searched from end to end: obviously right, and what the tree is held equal to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from services.engine.core.blocks import BlockChain
from services.engine.core.prefix_cache import CacheChange, PrefixMatch
from services.protocol.pages import PageLedger


@dataclass(slots=True)
class _Entry:
    """KV of the last block of `prefix`, which is a whole number of blocks."""

    seed: bytes
    prefix: tuple[int, ...]
    name: bytes
    page: int
    released_at: int = 0


class NaivePrefixCache:
    """See PrefixCache. Every call looks at every entry."""

    def __init__(self, ledger: PageLedger, page_size: int) -> None:
        self._ledger = ledger
        self._page_size = page_size
        self._entries: list[_Entry] = []
        self._ticks = count(1)
        self._last_look: tuple[bytes, ...] = ()

    def match(self, chain: BlockChain, limit: int) -> PrefixMatch:
        """See PrefixCache."""
        tokens = tuple(chain.tokens[:limit])
        pages: list[int] = []
        for end in range(self._page_size, len(tokens) + 1, self._page_size):
            full = self._find(chain.seed, tokens[:end])
            if full is None:
                break
            pages.append(full.page)
        num_full = len(pages) * self._page_size
        best, best_length = None, num_full
        for entry in self._entries:
            continues = len(entry.prefix) == num_full + self._page_size and entry.prefix[:num_full] == tokens[:num_full]
            if entry.seed == chain.seed and continues:
                length = num_full
                while length < len(tokens) and entry.prefix[length] == tokens[length]:
                    length += 1
                if length > best_length:
                    best, best_length = entry, length
        return PrefixMatch((*pages, best.page) if best else tuple(pages), best_length)

    def publish(self, chain: BlockChain, index: int, page: int) -> int:
        """See PrefixCache."""
        prefix = tuple(chain.tokens[: (index + 1) * self._page_size])
        known = self._find(chain.seed, prefix)
        if known is not None:
            return known.page
        if index and self._find(chain.seed, prefix[: -self._page_size]) is None:
            return page
        self._ledger.publish(page)
        self._entries.append(_Entry(chain.seed, prefix, chain.hash(index), page))
        return page

    def retain(self, pages: Sequence[int]) -> None:
        """See PrefixCache."""
        self._ledger.retain(pages)

    def release(self, pages: Sequence[int]) -> tuple[int, ...]:
        """See PrefixCache."""
        freed = self._ledger.release(pages)
        for page in reversed(pages):
            for entry in self._entries:
                if entry.page == page and self._ledger.users(page) == 0:
                    entry.released_at = next(self._ticks)
        return freed

    def make_room(self, num_free: int) -> tuple[int, ...]:
        """See PrefixCache."""
        freed: list[int] = []
        while self._ledger.num_free < num_free and (leaves := [e for e in self._entries if self._is_idle_leaf(e)]):
            oldest = min(leaves, key=lambda entry: entry.released_at)
            self._ledger.evict(oldest.page)
            self._entries.remove(oldest)
            freed.append(oldest.page)
        return tuple(freed)

    def take_change(self) -> CacheChange:
        """See PrefixCache."""
        before, self._last_look = self._last_look, self.snapshot()
        stored = tuple(name for name in self._last_look if name not in before)
        return CacheChange(stored, tuple(name for name in before if name not in self._last_look))

    def snapshot(self) -> tuple[bytes, ...]:
        """See PrefixCache."""
        return tuple(entry.name for entry in self._entries)

    def _find(self, seed: bytes, prefix: tuple[int, ...]) -> _Entry | None:
        return next((e for e in self._entries if e.seed == seed and e.prefix == prefix), None)

    def _is_idle_leaf(self, entry: _Entry) -> bool:
        continued = any(
            other.seed == entry.seed
            and len(other.prefix) > len(entry.prefix)
            and other.prefix[: len(entry.prefix)] == entry.prefix
            for other in self._entries
        )
        return self._ledger.users(entry.page) == 0 and not continued
