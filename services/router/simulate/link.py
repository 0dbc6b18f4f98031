"""The wire from one simulated engine to another."""

from __future__ import annotations


class Link:
    """Carries one thing after the other."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_at = 0.0

    def carry(self, num_bytes: int, ready_at: float, last_at: float) -> float:
        """When the bytes have arrived. Layers can be moved from `ready_at` on, the last one not before `last_at`."""
        self._free_at = max(self._free_at, ready_at) + num_bytes / self._bytes_per_s
        return max(self._free_at, last_at)
