"""Keeps the garbage collector from stopping a service that is under way."""

from __future__ import annotations

import gc

# Net allocations before the youngest objects are looked at, and how many looks until older ones are.
_THRESHOLDS = (10_000, 50, 100)


def settle_heap() -> None:
    """To be called when a service has started. What is there by then, modules above all, stays: a full collection takes
    40 ms to find that out, and is never to look at it again. Requests make no cycles, so what still makes some, such as
    a program of a user's, can wait longer for its memory."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
