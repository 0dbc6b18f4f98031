"""`--kvtransfer none`: the pool is the engine's own, and nothing arrives or leaves."""

from __future__ import annotations

from services.engine.errors import NoKvTransfer


def no_kvtransfer() -> NoKvTransfer:
    """The refusal of an engine with a private pool."""
    return NoKvTransfer("This engine runs without a KV transfer service: it can neither receive nor send KV.")
