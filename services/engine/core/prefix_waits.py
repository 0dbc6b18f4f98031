"""Waiting for a prefix in flight instead of computing or fetching it once more.

Who waits holds no page, and every wait ends: with the block landed, with its producer gone, or with patience. So two
engines whose sends wait for what the other one is about to send delay each other at most; none waits for ever.
"""

from __future__ import annotations

from dataclasses import dataclass

from services.engine.core.blocks import BlockChain
from services.engine.core.config import CoreConfig
from services.engine.core.in_flight import InFlightBlocks
from services.engine.core.pace import Pace
from services.engine.core.pool import PagePool
from services.engine.core.prefix_cache import PrefixMatch
from services.engine.core.timers import Timers


@dataclass(slots=True)
class PrefixWait:
    """One request's waits. `in_line`: it will be computed here itself, after those that came before it."""

    in_line: bool
    block: bytes | None = None  # the one that it waits for now
    ends_at: float | None = None  # end of its patience, from the first time that it needs some


class PrefixWaits:
    """Knows what is in flight, and decides who waits for it."""

    def __init__(self, config: CoreConfig, pool: PagePool, timers: Timers, pace: Pace) -> None:
        self.computing = InFlightBlocks[int]()  # by the sequence that runs
        self.arriving = InFlightBlocks[str]()  # by the reservation that is being filled
        self._config = config
        self._pool = pool
        self._timers = timers
        self._pace = pace

    def landed(self, block: bytes) -> None:
        """The block is readable."""
        self.computing.landed(block)
        self.arriving.landed(block)

    def find(self, chain: BlockChain, limit: int, wait: PrefixWait, now: float) -> PrefixMatch | None:
        """What the cache has of the chain's first `limit` tokens; None while it is better to wait for the next block.

        A request in line waits for what is computed here until it is there: those who compute it are served before
        it in any case, so it loses nothing. For all else its patience lasts as long as computing it would take, and
        max_prefix_wait_s at most: a wait in vain then costs no more than what it would have saved.
        """
        if wait.block is not None and self._is_worth(wait, now):
            return None
        wait.block = None
        match = self._pool.match(chain, limit)
        index = match.num_tokens // self._config.page_size
        num_coming = self._num_coming(chain, index, limit)
        if num_coming:
            wait.block = chain.hash(index)
            self._begin_patience(wait, num_coming, now)
            if self._is_worth(wait, now):
                return None
            wait.block = None
        return match

    def _is_worth(self, wait: PrefixWait, now: float) -> bool:
        assert wait.block is not None
        if wait.in_line and self.computing.contains(wait.block):
            return True
        return self._is_coming(wait.block) and wait.ends_at is not None and now < wait.ends_at

    def _begin_patience(self, wait: PrefixWait, num_blocks: int, now: float) -> None:
        assert wait.block is not None
        if wait.ends_at is None and not (wait.in_line and self.computing.contains(wait.block)):
            seconds = self._pace.seconds_for(num_blocks * self._config.page_size)
            wait.ends_at = now + min(seconds, self._config.max_prefix_wait_s)
            self._timers.at(wait.ends_at, _look_again)

    def _num_coming(self, chain: BlockChain, index: int, limit: int) -> int:
        """How many blocks in a row, from `index`, are in flight."""
        num_coming = 0
        while (index + num_coming + 1) * self._config.page_size <= limit and self._is_coming(
            chain.hash(index + num_coming)
        ):
            num_coming += 1
        return num_coming

    def _is_coming(self, block: bytes) -> bool:
        return self.computing.contains(block) or self.arriving.contains(block)


def _look_again() -> None:
    """A timer's due time makes the core step, and every step looks at those who wait."""
