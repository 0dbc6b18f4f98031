"""The interface of a prefix cache: which pages already hold KV of a prompt's beginning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from services.engine.core.blocks import BlockChain


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """Pages that hold the first `num_tokens` tokens, in order; the last one may match in its first tokens only."""

    page_ids: tuple[int, ...]
    num_tokens: int

    def without_part(self, page_size: int) -> PrefixMatch:
        """Only the pages that match as a whole."""
        num_whole = self.num_tokens // page_size
        return PrefixMatch(self.page_ids[:num_whole], num_whole * page_size)


@dataclass(frozen=True, slots=True)
class CacheChange:
    """Blocks that entered and left since the last look; a block that did both is in neither."""

    stored: tuple[bytes, ...]
    removed: tuple[bytes, ...]

    def __bool__(self) -> bool:
        return bool(self.stored or self.removed)


class PrefixCache(Protocol):
    """Published pages by content. Users of pages are counted in the PageLedger, through retain and release here.

    Whoever holds a page of a prefix normally holds all pages before it, so least recently released means leaves first.
    Where that does not hold (two copies of a prefix), a page that others continue is passed over by make_room.
    """

    def match(self, chain: BlockChain, limit: int) -> PrefixMatch:
        """The longest readable prefix of the chain's first `limit` tokens. Retains nothing."""

    def publish(self, chain: BlockChain, index: int, page: int) -> int:
        """Offers a held page that holds the full block `index`; it is never written again.

        Returns the page under which the block is known: another one if the block was there already. A block whose
        predecessor is not in the cache cannot be found, so it is not taken, and `page` is returned.
        """

    def retain(self, pages: Sequence[int]) -> None:
        """Adds one user to each page, which is held or cached."""

    def release(self, pages: Sequence[int]) -> tuple[int, ...]:
        """Takes one user off each page, given in token order. Returns those that are free now."""

    def make_room(self, num_free: int) -> tuple[int, ...]:
        """Evicts what nobody uses, least recently released first, until so many pages are free or nothing is left.

        Returns the pages freed.
        """

    def take_change(self) -> CacheChange:
        """What changed since the last call."""

    def snapshot(self) -> tuple[bytes, ...]:
        """All blocks in the cache, each after its predecessor."""
