"""What the core of an engine is told at start, checked once."""

from __future__ import annotations

from dataclasses import dataclass

from services.protocol.layout import PageLayout


@dataclass(frozen=True, slots=True)
class CoreConfig:
    """Model, pool and limits. Raises ValueError for values that cannot work.

    A pool that also receives KV from peers should hold more than one longest prompt: reservations together leave the
    pages of one free (rule 6), so in a smaller pool nothing can be reserved. `max_context` is the way to say so.
    """

    model_digest: bytes
    layout: PageLayout
    num_pages: int
    vocab_size: int
    max_context: int  # tokens of prompt and output together
    eos_token_ids: tuple[int, ...] = ()
    incarnation: bytes = b""  # of this engine: keeps its writes apart from those of an earlier or other engine
    max_batch_size: int = 64  # sequences computed in one step
    max_step_tokens: int = 512  # tokens computed in one step
    max_waiting: int = 256  # requests that wait to be computed, beyond those with a reservation
    max_reservations: int = 1024
    default_lease_s: float = 30.0
    max_lease_s: float = 600.0
    max_send_s: float = 600.0  # longest that a RemoteSend may take, whatever its deadline
    max_wait_s: float = 60.0  # longest that PrepRecv waits for pages
    max_prefix_wait_s: float = 2.0  # longest that a request waits for KV that a peer is sending for another one
    max_finished_requests: int = 4096  # remembered for retries
    poison_pages: bool = False  # fill freed pages with NaN, so that a read of stale pages shows
    check_every_step: bool = False  # verify all invariants after every step

    def __post_init__(self) -> None:
        counts = (self.num_pages, self.vocab_size, self.max_batch_size, self.max_step_tokens, self.max_waiting)
        if min(counts) < 1 or self.max_context < 2 or self.max_reservations < 0:
            raise ValueError("pages, vocabulary, batch, step and queue need at least 1, the context at least 2")
        if not 0 < self.default_lease_s <= self.max_lease_s or min(self.max_wait_s, self.max_prefix_wait_s) < 0:
            raise ValueError("leases must be positive, the default at most the longest, and waits not negative")

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return self.layout.page_size

    @property
    def context_limit(self) -> int:
        """Most tokens a sequence can have: the model's context, or the whole pool if that is smaller."""
        return min(self.max_context, self.num_pages * self.page_size)

    @property
    def max_reserved_pages(self) -> int:
        """Pages that reservations may pin together: all but those of one longest prompt (rule 6)."""
        return self.num_pages - self.num_pages_for(self.context_limit)

    def num_pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)
