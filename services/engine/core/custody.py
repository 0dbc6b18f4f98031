"""The pages of one reservation, from the moment they are set aside until no peer can write them."""

from __future__ import annotations

from collections import Counter

from services.engine.core.pool import PagePool


class Custody:
    """Every page is in exactly one of four hands.

        shared       matched in the prefix cache and pinned, read only
        own          set aside for what arrives; the first holds the window's begin
        fenced       once own, kept until the grant is drained though a sequence or the cache has them too
        quarantined  once own, nobody's, possibly still being written

    "Open" below says whether a grant may still let a peer write into own pages.
    """

    def __init__(self, pool: PagePool, shared: tuple[int, ...], own: tuple[int, ...]) -> None:
        self._pool = pool
        self.shared = shared
        self.own = own
        self._fenced: tuple[int, ...] = ()
        self._quarantined: tuple[int, ...] = ()

    def hand_over(self, *, is_open: bool) -> tuple[int, ...]:
        """Gives all pages, in token order, to a sequence that will release them."""
        pages = self.shared + self.own
        if is_open:
            self._pool.retain(self.own)
            self._fenced = self.own
        self.shared = self.own = ()
        return pages

    def give_up(self, *, is_open: bool) -> None:
        """Ends the reservation's use of all pages. What was published of its own stays cached."""
        if is_open:
            self._quarantine(self.own)
            self._pool.release(self.shared)
        else:
            self._pool.release(self.shared + self.own)
        self.shared = self.own = ()

    def sequence_gone(self) -> None:
        """The sequence has released its pages: those that only the fence keeps go into quarantine."""
        self._quarantine(self._fenced)

    def drained(self) -> None:
        """Nothing writes any of the pages any more."""
        quarantined, fenced = self._quarantined, self._fenced
        self._quarantined = self._fenced = ()
        self._pool.drained(quarantined)
        self._pool.release(fenced)

    def count_users(self, users: Counter[int], quarantined: set[int]) -> None:
        """Adds what it holds to the books of an audit."""
        users.update(self.shared + self.own + self._fenced)
        quarantined.update(self._quarantined)

    def _quarantine(self, pages: tuple[int, ...]) -> None:
        private = [page for page in pages if self._pool.is_private(page)]
        self._fenced = tuple(page for page in pages if not self._pool.is_private(page))
        self._pool.quarantine(private)
        self._quarantined += tuple(private)
