"""How fast the machine is at a moment: it may be shared with others whom it does not show."""

from __future__ import annotations

import asyncio
import hashlib
import time
from concurrent.futures import ThreadPoolExecutor
from math import inf

import numpy as np

PROBE_BYTES = 1 << 24
LOOKS = 20
LOOK_EVERY_S = 0.5


class Machine:
    """A fixed job, computing and copying, on every core at once, again and again."""

    def __init__(self, num_cores: int) -> None:
        self._pool = ThreadPoolExecutor(num_cores)
        self._buffers = [(np.ones(PROBE_BYTES, np.uint8), np.zeros(PROBE_BYTES, np.uint8)) for _ in range(num_cores)]
        self._least_s = inf

    def slowdown(self) -> float:
        """Time that the job takes now over the least that it ever took."""
        begin = time.perf_counter()
        list(self._pool.map(_job, self._buffers))
        seconds = time.perf_counter() - begin
        self._least_s = min(self._least_s, seconds)
        return seconds / self._least_s

    async def calm(self, limit: float) -> float:
        """Waits until the slowdown is within the limit, for LOOKS looks at most; returns it."""
        slowdown = self.slowdown()
        for _ in range(LOOKS):
            if slowdown <= limit:
                break
            await asyncio.sleep(LOOK_EVERY_S)
            slowdown = self.slowdown()
        return slowdown


def _job(buffers: tuple[np.ndarray, np.ndarray]) -> None:
    source, target = buffers
    hashlib.sha256(source.data).digest()
    for _ in range(4):
        np.copyto(target, source)
