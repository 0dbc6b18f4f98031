"""What a simulated engine has to do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from services.protocol.ranges import TokenRange
from services.protocol.timing import Timing
from services.router.fleet.mailbox import Mailbox
from services.router.request import PolicyRequest


@dataclass(slots=True, eq=False)
class Booking:
    """A reservation."""

    hashes: list[bytes]
    window: TokenRange
    received: int = 0  # tokens
    on_filled: Callable[[], None] | None = None

    @property
    def is_filled(self) -> bool:
        """Whether KV of its whole window has come."""
        return self.received >= len(self.window)

    def receive(self, num_tokens: int) -> None:
        """They are in place."""
        self.received += num_tokens
        if self.is_filled and self.on_filled is not None:
            self.on_filled()
            self.on_filled = None


@dataclass(slots=True, eq=False)
class Work:
    """A prompt to compute; and then either tokens to generate, into `mailbox`, or a range to send."""

    request: PolicyRequest
    hashes: list[bytes]
    goal: int  # tokens to have computed before the next token, or the end of the range
    arrived_at: float
    mailbox: Mailbox | None = None
    booking: Booking | None = None  # what it generates on, or sends to
    sending: TokenRange | None = None
    carry: Callable[[int, float, float], float] | None = None  # Link.carry for so many tokens
    arrived: asyncio.Event = field(default_factory=asyncio.Event)  # the range, at the other end
    arrives_at: float = 0.0  # the last of what is on its way
    computed: int = 0  # tokens whose KV is there
    published: int = 0  # blocks of them that others may use
    matched: int = 0
    own: int = 0  # prompt tokens that were computed for it
    generated: int = 0
    scheduled_at: float | None = None
    prefilled_at: float | None = None

    @property
    def left(self) -> int:
        """Tokens to compute."""
        return self.goal - self.computed

    @property
    def max_tokens(self) -> int:
        """To generate."""
        return max(1, self.request.sampling.max_tokens - self.request.num_generated)

    def timing(self, now: float, bytes_per_token: int) -> Timing:
        """The account, as an engine gives it."""
        scheduled_at = now if self.scheduled_at is None else self.scheduled_at
        prefilled_at = now if self.prefilled_at is None else self.prefilled_at
        moved = self.sending or (TokenRange(0, 0) if self.booking is None else self.booking.window)
        return Timing(
            matched_tokens=self.matched,
            transferred_tokens=len(moved),
            computed_tokens=self.own,
            generated_tokens=self.generated,
            transferred_bytes=len(moved) * bytes_per_token,
            queue_s=scheduled_at - self.arrived_at,
            prefill_s=max(0.0, prefilled_at - scheduled_at),
            transfer_s=max(0.0, now - prefilled_at) if self.sending else 0.0,
            total_s=now - self.arrived_at,
        )
