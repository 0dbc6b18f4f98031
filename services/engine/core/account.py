"""What a verb cost on this engine: where each token's KV came from and where the time went."""

from __future__ import annotations

from dataclasses import dataclass

from services.protocol.timing import Timing


@dataclass(slots=True)
class Account:
    """Filled in while a verb runs; times are moments on the engine's clock, None until they come."""

    arrived_at: float
    scheduled_at: float | None = None
    prefilled_at: float | None = None
    matched_tokens: int = 0
    transferred_tokens: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    transferred_bytes: int = 0
    transfer_s: float = 0.0
    preemptions: int = 0

    def scheduled(self, now: float) -> None:
        """First time that the verb is given a place; later ones change nothing."""
        if self.scheduled_at is None:
            self.scheduled_at = now

    def prefilled(self, now: float) -> None:
        """First time that all of the prompt is computed; later ones change nothing."""
        if self.prefilled_at is None:
            self.prefilled_at = now

    def timing(self, now: float) -> Timing:
        """The account as it stands."""
        scheduled_at = now if self.scheduled_at is None else self.scheduled_at
        prefilled_at = now if self.prefilled_at is None else self.prefilled_at
        return Timing(
            matched_tokens=self.matched_tokens,
            transferred_tokens=self.transferred_tokens,
            computed_tokens=self.computed_tokens,
            generated_tokens=self.generated_tokens,
            transferred_bytes=self.transferred_bytes,
            queue_s=scheduled_at - self.arrived_at,
            prefill_s=max(0.0, prefilled_at - scheduled_at),
            transfer_s=self.transfer_s,
            total_s=now - self.arrived_at,
            preemptions=self.preemptions,
        )
