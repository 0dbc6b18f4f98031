"""Who has each page of a pool. The only place where page ids are handed out and taken back.

    free ──allocate──> held ──release (last user, not published)──> free
                        │ └──release (last user, published)──> cached ──retain──> held
                        └──quarantine──> quarantined ──drained──> free         cached ──evict──> free

A page is held while somebody uses it: a sequence, a reservation, a send. A published page belongs to the prefix
cache and is never written again. A quarantined page has no user but may still be written by a peer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass


class OutOfPages(Exception):
    """Fewer pages are free than were asked for. The ledger is unchanged."""


class LedgerViolation(AssertionError):
    """A caller broke the rules above: a bug in the engine, never the fault of a request."""


@dataclass(frozen=True, slots=True)
class PageCounts:
    """How many pages are in each hand; they add up to `total`."""

    free: int
    cached: int
    held: int
    quarantined: int
    total: int


class PageLedger:
    """Accounts for the pages 0 .. total-1."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._free: deque[int] = deque(range(total))
        self._is_free = [True] * total
        self._users = [0] * total
        self._published = [False] * total
        self._quarantined: set[int] = set()
        self._num_held = 0

    @property
    def num_free(self) -> int:
        """Pages that allocate() can hand out."""
        return len(self._free)

    def counts(self) -> PageCounts:
        """The pages in each hand. O(1)."""
        cached = self._total - len(self._free) - self._num_held - len(self._quarantined)
        return PageCounts(len(self._free), cached, self._num_held, len(self._quarantined), self._total)

    def allocate(self, count: int) -> tuple[int, ...]:
        """Takes `count` free pages for one user. Raises OutOfPages and takes none if there are fewer."""
        if count > len(self._free):
            raise OutOfPages(f"{count} pages wanted, {len(self._free)} free")
        pages = tuple(self._free.popleft() for _ in range(count))
        for page in pages:
            self._is_free[page] = False
            self._users[page] = 1
        self._num_held += count
        return pages

    def retain(self, pages: Iterable[int]) -> None:
        """Adds one user to each of the pages, which are held or cached."""
        for page in pages:
            self._require(not self._is_free[page] and page not in self._quarantined, page, "retained while not in use")
            if self._users[page] == 0:
                self._num_held += 1
            self._users[page] += 1

    def release(self, pages: Iterable[int]) -> tuple[int, ...]:
        """Takes one user off each of the pages. Returns those that are free now."""
        freed = []
        for page in pages:
            self._require(self._users[page] > 0, page, "released more often than retained")
            self._users[page] -= 1
            if self._users[page] == 0:
                self._num_held -= 1
                if not self._published[page]:
                    freed.append(self._to_free(page))
        return tuple(freed)

    def publish(self, page: int) -> None:
        """Hands a held page to the prefix cache. It is never written again."""
        self._require(self._users[page] > 0 and not self._published[page], page, "published while not private")
        self._published[page] = True

    def evict(self, page: int) -> None:
        """Takes a cached page that nobody uses out of the prefix cache."""
        self._require(self._published[page] and self._users[page] == 0, page, "evicted while in use")
        self._published[page] = False
        self._to_free(page)

    def quarantine(self, pages: Iterable[int]) -> None:
        """Takes the only user off private pages that a peer may still write."""
        for page in pages:
            private = self._users[page] == 1 and not self._published[page]
            self._require(private, page, "quarantined while shared")
            self._users[page] = 0
            self._num_held -= 1
            self._quarantined.add(page)

    def drained(self, pages: Iterable[int]) -> tuple[int, ...]:
        """Frees quarantined pages: it is certain that nothing writes them any more. Returns them."""
        freed = []
        for page in pages:
            self._require(page in self._quarantined, page, "drained while not in quarantine")
            self._quarantined.remove(page)
            freed.append(self._to_free(page))
        return tuple(freed)

    def users(self, page: int) -> int:
        """Users of a page."""
        return self._users[page]

    def is_published(self, page: int) -> bool:
        """Whether the page is part of the prefix cache and must not be written."""
        return self._published[page]

    def is_quarantined(self, page: int) -> bool:
        """Whether the page waits for its last writer to be fenced."""
        return page in self._quarantined

    def _to_free(self, page: int) -> int:
        self._require(not self._is_free[page], page, "freed twice")
        self._is_free[page] = True
        self._free.append(page)
        return page

    @staticmethod
    def _require(condition: bool, page: int, what: str) -> None:
        if not condition:
            raise LedgerViolation(f"page {page} {what}")
