"""Finding room for a reservation without ever taking what a longest prompt needs (rule 6)."""

from __future__ import annotations

from collections import Counter

from services.engine.core.blocks import BlockChain
from services.engine.core.context import Context
from services.engine.core.custody import Custody
from services.engine.core.plan import PageCopy
from services.protocol.pages import OutOfPages


class Reserver:
    """Counts the pages that reservations pin, those of several once."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._pinned: Counter[int] = Counter()

    def reserve(self, chain: BlockChain, end: int) -> tuple[Custody, int] | None:
        """Pins the cached prefix of the first `end` tokens and takes pages for the rest, all or nothing.

        Returns the pages and the number of tokens matched, or None if there is no room. A page of which only the
        first tokens match is copied into the first private page, because the rest will be written (rule 5).
        """
        pool, page_size = self._context.pool, self._context.config.page_size
        match = pool.match(chain, end)
        pool.retain(match.page_ids)
        num_full = match.num_tokens // page_size
        is_whole = match.num_tokens == end
        shared = match.page_ids if is_whole else match.page_ids[:num_full]
        own = self._take(shared, 0 if is_whole else self._context.config.num_pages_for(end) - num_full)
        if own is None:
            pool.release(match.page_ids)
            return None
        partial = match.page_ids[len(shared) :]
        if partial:
            self._context.runner.copy_pages([PageCopy(partial[0], own[0])])
            pool.release(partial)
        custody = Custody(pool, shared, own)
        self._pinned.update(shared + own)
        return custody, match.num_tokens

    def unpin(self, custody: Custody) -> None:
        """The pages are about to leave the reservation's hands."""
        self._pinned.subtract(custody.shared + custody.own)
        for page in custody.shared + custody.own:
            if self._pinned[page] <= 0:
                del self._pinned[page]

    def _take(self, shared: tuple[int, ...], num_own: int) -> tuple[int, ...] | None:
        """Private pages, unless that leaves too few for a longest prompt or for the oldest that waits."""
        context = self._context
        num_new = num_own + sum(1 for page in shared if page not in self._pinned)
        num_pinned = len(self._pinned) + context.pool.counts().quarantined
        owed = context.scheduler.pages_owed
        if num_pinned + num_new > context.config.max_reserved_pages or not context.pool.make_room(num_own + owed):
            return None
        try:
            return context.pool.take(num_own)
        except OutOfPages:
            return None
