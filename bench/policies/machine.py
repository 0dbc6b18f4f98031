"""How fast the machine is at a moment, and how much of it others have: it may be shared, with some whom it does not
show, too."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

PROBE_BYTES = 1 << 24
LOOKS = 6
LOOK_EVERY_S = 0.5
LATELY = 24  # jobs: a machine may be slow for minutes, and arms that are compared are alike then, too


class Machine:
    """A fixed job, computing and copying, on every core at once, again and again."""

    def __init__(self, num_cores: int, ours: Iterable[int] = ()) -> None:
        """`ours`: processes that are measured; this one is not another's either."""
        self._ours = (os.getpid(), *ours)
        self._pool = ThreadPoolExecutor(num_cores)
        self._buffers = [(np.ones(PROBE_BYTES, np.uint8), np.zeros(PROBE_BYTES, np.uint8)) for _ in range(num_cores)]
        self._lately_s = deque[float](maxlen=LATELY)

    def slowdown(self) -> float:
        """Time that the job takes now over the least that it took lately."""
        begin = time.perf_counter()
        list(self._pool.map(_job, self._buffers))
        seconds = time.perf_counter() - begin
        self._lately_s.append(seconds)
        return seconds / min(self._lately_s)

    def watch(self) -> Callable[[], float]:
        """Gives the share of the processors that others have had since, the hypervisor among them if it tells."""
        begin_s, begin = time.perf_counter(), _busy_s() - _used_s(self._ours)

        def others() -> float:
            seconds = (time.perf_counter() - begin_s) * (os.cpu_count() or 1)
            return max(0.0, _busy_s() - _used_s(self._ours) - begin) / seconds

        return others

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


def _busy_s() -> float:
    """Seconds in which a processor was not idle, summed (proc(5), /proc/stat)."""
    user, nice, system, _, _, *rest = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def _used_s(processes: Iterable[int]) -> float:
    """Seconds of processors that they have used (proc(5), /proc/pid/stat: utime and stime)."""
    fields = (Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split() for process in processes)
    return sum(int(each[11]) + int(each[12]) for each in fields) / os.sysconf("SC_CLK_TCK")
