"""The pages of this engine: the one door to the ledger and the prefix cache."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from itertools import chain

from services.engine.core.blocks import BlockChain
from services.engine.core.prefix_cache import CacheChange, PrefixMatch
from services.engine.core.prefix_tree import PrefixTree
from services.protocol.pages import PageCounts, PageLedger


class PagePool:
    """Hands out pages, evicting cached ones as needed, and takes them back.

    A page that is released while a step is under way goes back when that step is over: until then it may be read and
    written. So nobody else, and no peer, can have it before.
    `poison` is told of all pages that became free, before anyone can have them again.
    """

    def __init__(self, num_pages: int, page_size: int, poison: Callable[[Sequence[int]], None] | None = None) -> None:
        self.page_size = page_size
        self._ledger = PageLedger(num_pages)
        self._cache = PrefixTree(self._ledger, page_size)
        self._poison = poison
        self._parked: deque[list[Sequence[int]]] = deque()  # one list a step under way: released since it began
        self._freed(range(num_pages))

    def counts(self) -> PageCounts:
        """Who has how many pages."""
        return self._ledger.counts()

    def make_room(self, count: int) -> bool:
        """Whether so many pages can be free together; then they are, evicted from the cache as needed."""
        counts = self.counts()
        if count > counts.free + counts.cached:
            return False
        self._freed(self._cache.make_room(count))  # a cached page that others continue cannot be had
        return count <= self._ledger.num_free

    def take(self, count: int) -> tuple[int, ...]:
        """So many private pages with one user. Raises OutOfPages and takes none; cached ones may be gone then."""
        self._freed(self._cache.make_room(count))
        return self._ledger.allocate(count)

    def match(self, chain: BlockChain, limit: int) -> PrefixMatch:
        """The longest readable prefix of the chain's first `limit` tokens, not yet retained."""
        return self._cache.match(chain, limit)

    def retain(self, pages: Sequence[int]) -> None:
        """Adds a user to pages that are held or cached."""
        self._cache.retain(pages)

    def release(self, pages: Sequence[int]) -> None:
        """Takes a user off pages, given in token order, at once or when the newest step under way is over."""
        if self._parked:
            self._parked[-1].append(pages)
        else:
            self._freed(self._cache.release(pages))

    def begin_step(self) -> None:
        """A step is under way; steps end in the order in which they begin."""
        self._parked.append([])

    def end_step(self) -> None:
        """The oldest step under way is over."""
        for pages in self._parked.popleft():
            self._freed(self._cache.release(pages))

    def publish(self, chain: BlockChain, index: int, page: int) -> int:
        """Offers a page that holds the full block `index`; see PrefixCache.publish."""
        return self._cache.publish(chain, index, page)

    def quarantine(self, pages: Iterable[int]) -> None:
        """Gives up private pages that a peer may still write."""
        self._ledger.quarantine(pages)

    def drained(self, pages: Iterable[int]) -> None:
        """Nothing writes these quarantined pages any more."""
        self._freed(self._ledger.drained(pages))

    def is_published(self, page: int) -> bool:
        """Whether the page must not be written."""
        return self._ledger.is_published(page)

    def is_private(self, page: int) -> bool:
        """Whether the page has one user and is not published."""
        return self._ledger.users(page) == 1 and not self._ledger.is_published(page)

    def take_change(self) -> CacheChange:
        """Blocks that entered and left the prefix cache since the last call."""
        return self._cache.take_change()

    def snapshot(self) -> tuple[bytes, ...]:
        """All blocks in the prefix cache, each after its predecessor."""
        return self._cache.snapshot()

    def check(self, users: Counter[int], quarantined: set[int]) -> None:
        """Raises AssertionError unless the books agree with what the owners say they hold. O(pages)."""
        for parked in self._parked:
            users.update(chain.from_iterable(parked))
        counts = self.counts()
        for page in range(counts.total):
            actual = self._ledger.users(page)
            assert actual == users[page], f"page {page} has {actual} users in the ledger, {users[page]} owners"
            assert self._ledger.is_quarantined(page) == (page in quarantined), f"page {page}: quarantine differs"
        assert counts.free + counts.cached + counts.held + counts.quarantined == counts.total
        assert (counts.held, counts.quarantined) == (len(+users), len(quarantined))
        self._cache.check()

    def _freed(self, pages: Sequence[int]) -> None:
        if self._poison is not None and pages:
            self._poison(pages)
