"""Keeps the garbage collector from stopping a service that is under way."""

from __future__ import annotations

import gc

# Net allocations before the youngest objects are looked at, and how many looks until older ones are. grpc makes a cycle
# of half a dozen objects for every call that a server takes. Freed by ten thousand they stop the service for 5 to 8 ms,
# by the thousand for 1 and at times 3, which costs 20 us a call.
_THRESHOLDS = (1_000, 20, 50)


def settle_heap() -> None:
    """To be called when a service has started. What is there by then, modules above all, stays: a full collection takes
    40 ms to find that out, and is never to look at it again. What comes later is looked at in small parts."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
