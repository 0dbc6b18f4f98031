"""An engine's account of a verb."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timing:
    """Where each token's KV came from and where the time went; seconds, tokens, bytes. See types.v1.Timing."""

    matched_tokens: int = 0
    transferred_tokens: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    transferred_bytes: int = 0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    transfer_s: float = 0.0
    total_s: float = 0.0
    preemptions: int = 0
