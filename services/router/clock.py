"""The time that requests are measured by."""

from __future__ import annotations

import asyncio


def now() -> float:
    """Seconds on the running event loop's clock: time.monotonic(), but in a simulation the simulated time."""
    return asyncio.get_running_loop().time()
