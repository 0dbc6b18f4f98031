"""Which tokens the next step computes: continuous batching under a token budget.

Running sequences with one token left come first (decode), then prompts in pieces, then new sequences, each in order of
arrival. A running sequence that finds no page preempts the youngest that generates, itself if need be; a waiting one
holds no pages, except one whose pages came from a peer, which takes part as if it ran. So the oldest always gets on,
and no call waits for pages while holding any (rule 6). Sends get all their pages at once or are refused.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator

from services.engine.core.config import CoreConfig
from services.engine.core.draft import Draft
from services.engine.core.plan import StepPlan
from services.engine.core.pool import PagePool
from services.engine.core.prefix_cache import PrefixMatch
from services.engine.core.prefix_waits import PrefixWaits
from services.engine.core.sequence import Phase, Sequence
from services.engine.core.stopping import will_have_all
from services.protocol.pages import OutOfPages


def _age(sequence: Sequence) -> int:
    return sequence.number


class Scheduler:
    """Owns the queue and the batch. Pages of a sequence that is removed are released by whoever removes it."""

    def __init__(self, config: CoreConfig, pool: PagePool, waits: PrefixWaits) -> None:
        self._config = config
        self._pool = pool
        self._waits = waits
        self._waiting: list[Sequence] = []  # both by age
        self._running: list[Sequence] = []
        self._pages_owed = 0
        self._is_short = False  # a plan that was made ahead found too few pages

    @property
    def pages_owed(self) -> int:
        """Pages that the oldest waiting sequence lacks: they are not for those who came later."""
        return self._pages_owed

    @property
    def num_running(self) -> int:
        """Sequences in the batch."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue, those with pages from a peer too."""
        return len(self._waiting)

    @property
    def num_queued(self) -> int:
        """Sequences in the queue that hold nothing: the ones that the bound is for."""
        return sum(1 for sequence in self._waiting if not sequence.pages)

    def __iter__(self) -> Iterator[Sequence]:
        """All sequences in batch and queue."""
        yield from self._running
        yield from self._waiting

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence into the queue, where its age says."""
        sequence.phase = Phase.WAITING
        insort(self._waiting, sequence, key=_age)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out of batch or queue, if it is there."""
        if sequence.phase is Phase.RUNNING:
            self._running.remove(sequence)
            self._waits.computing.withdraw(sequence.number)
        elif sequence.phase is Phase.WAITING:
            self._waiting.remove(sequence)
            self._pages_owed = 0  # perhaps it was the one that lacked them; the next plan finds out
        sequence.phase = Phase.ENDED

    def plan(self, now: float, *, is_ahead: bool = False) -> StepPlan:
        """Decides the next step and takes pages for it. The caller runs it, then settles or removes each sequence.

        `is_ahead`: the step before is still under way, so nothing is preempted or refused for pages that it may be
        about to give back, and what depends on the tokens that it chooses has to wait for them.
        """
        if is_ahead and (self._is_short or any(sequence.needs_news for sequence in self._running)):
            self._is_short = False
            return StepPlan(must_settle=True)
        draft = Draft(self._config.max_step_tokens, is_ahead=is_ahead)
        self._is_short = False
        running = list(self._running)
        for is_decode in (True, False):
            for sequence in running:
                if (sequence.num_left == 1) == is_decode:
                    self._extend(sequence, draft)
        self._admit(draft, now)
        plan = draft.plan()
        return StepPlan(must_settle=True) if is_ahead and not plan.changes_something else plan

    def settle(self, sequence: Sequence, end: int) -> None:
        """Positions up to `end` are computed: publishes full pages and takes a finished send out of the batch."""
        sequence.num_computed = end
        self.publish(sequence)
        if not sequence.generates and end == sequence.goal:
            self.remove(sequence)
            sequence.phase = Phase.COMPUTED

    def publish(self, sequence: Sequence) -> None:
        """Offers the sequence's full pages to the prefix cache.

        Where a block is there already, a generating sequence changes over to the page under which it is known, so
        that it holds every page before the ones it published. A send keeps its own: they may be being read.
        """
        chain, page_size = sequence.chain, self._pool.page_size
        while (sequence.num_published + 1) * page_size <= sequence.num_computed:
            index = sequence.num_published
            page = sequence.pages[index]
            known = self._pool.publish(chain, index, page)
            if known != page and sequence.generates:
                self._pool.retain([known])
                self._pool.release([page])
                sequence.pages[index] = known
            self._waits.landed(chain.hash(index))
            sequence.num_published += 1

    def _extend(self, sequence: Sequence, draft: Draft) -> None:
        """Gives a sequence of the batch its share of the budget, and pages for it."""
        if sequence.num_awaited and will_have_all(sequence, self._config):
            return
        end = draft.end_for(sequence, self._pool.page_size)
        while sequence.phase is Phase.RUNNING and end > sequence.num_planned:
            try:
                self._give_pages(sequence, end, draft)
            except OutOfPages:
                if draft.is_ahead:
                    self._is_short = True
                    return
                self._preempt(max(self._preemptable(), key=_age), draft)
            else:
                draft.add(sequence, end)
                return

    def _give_pages(self, sequence: Sequence, end: int, draft: Draft) -> None:
        """Pages up to position `end`, and a private copy of the first page to be written if it is published."""
        first = sequence.num_planned // self._pool.page_size
        is_shared = first < len(sequence.pages) and self._pool.is_published(sequence.pages[first])
        num_missing = max(0, self._config.num_pages_for(end) - len(sequence.pages))
        if not num_missing and not is_shared:
            return
        pages = self._pool.take(num_missing + is_shared)
        if is_shared:
            draft.copy(sequence, sequence.pages[first], pages[-1])
            sequence.pages[first] = pages[-1]
        sequence.pages.extend(pages[:num_missing])

    def _preemptable(self) -> list[Sequence]:
        return [sequence for sequence in self if sequence.generates and sequence.pages]

    def _preempt(self, sequence: Sequence, draft: Draft) -> None:
        """Back to the queue with nothing. Its tokens stay, so it goes on where it was."""
        self.remove(sequence)
        self._pool.release(sequence.take_pages())
        sequence.account.preemptions += 1
        draft.preempt(sequence)
        self.add(sequence)

    def _admit(self, draft: Draft, now: float) -> None:
        """Takes waiting sequences into the batch. One that finds too few pages holds up those behind that want some."""
        pages_owed = 0
        for sequence in list(self._waiting):
            if not draft.budget or len(self._running) >= self._config.max_batch_size:
                pages_owed = pages_owed or self._pages_owed  # not looked at in this step, so not paid either
                break
            if not sequence.pages:
                if sequence.generates and pages_owed:
                    continue
                match = self._waits.find(sequence.chain, sequence.match_limit, sequence.wait, now)
                if match is None:
                    continue
                num_lacking = pages_owed or self._take(sequence, match, draft)
                if num_lacking and sequence.generates:
                    pages_owed = num_lacking
                    continue
                if num_lacking and draft.is_ahead:
                    self._is_short = True
                    continue
                if num_lacking:
                    self.remove(sequence)
                    draft.refuse(sequence)
                    continue
            self._start(sequence, draft, now)
            self._extend(sequence, draft)
        self._pages_owed = pages_owed

    def _take(self, sequence: Sequence, match: PrefixMatch, draft: Draft) -> int:
        """Takes what the cache has of a sequence, and a send's other pages. Returns how many lack; then takes none.

        A page that matches in part is held beside its copy: a sequence that wants the whole pool does without it.
        """
        num_lacking = self._take_match(sequence, match, draft)
        if num_lacking and match.num_tokens % self._pool.page_size:
            num_lacking = self._take_match(sequence, match.without_part(self._pool.page_size), draft)
        return num_lacking

    def _take_match(self, sequence: Sequence, match: PrefixMatch, draft: Draft) -> int:
        """The same, with the match as it is."""
        self._pool.retain(match.page_ids)
        sequence.pages.extend(match.page_ids)
        sequence.has_computed(match.num_tokens)
        sequence.num_published = match.num_tokens // self._pool.page_size
        num_wanted = self._num_pages_wanted(sequence)
        num_promised = sum(self._num_pages_wanted(other) for other in self._running)
        if self._pool.make_room(num_wanted + num_promised):
            try:
                if not sequence.generates and sequence.num_left:
                    self._give_pages(sequence, sequence.goal, draft)
            except OutOfPages:
                pass
            else:
                if not sequence.account.preemptions:
                    sequence.account.matched_tokens = match.num_tokens
                return 0
        self._pool.release(sequence.take_pages())
        return num_wanted

    def _num_pages_wanted(self, sequence: Sequence) -> int:
        """Pages that a sequence lacks until its next token, one for copying a page that it must not write included."""
        if not sequence.num_left:
            return 0
        first = sequence.num_planned // self._pool.page_size
        is_shared = first < len(sequence.pages) and self._pool.is_published(sequence.pages[first])
        return max(0, self._config.num_pages_for(sequence.room_wanted) - len(sequence.pages)) + is_shared

    def _start(self, sequence: Sequence, draft: Draft, now: float) -> None:
        """From the queue into the batch, or past it if a send finds all of its range in the cache."""
        self._waiting.remove(sequence)
        sequence.account.scheduled(now)
        draft.admit(sequence)
        if not sequence.num_left:
            sequence.phase = Phase.COMPUTED
            return
        sequence.phase = Phase.RUNNING
        insort(self._running, sequence, key=_age)
        page_size = self._pool.page_size
        coming = range(sequence.num_computed // page_size, sequence.goal // page_size)
        self._waits.computing.announce(sequence.number, (sequence.chain.hash(index) for index in coming))
