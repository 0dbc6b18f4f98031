"""Which cores processes run on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress


@contextmanager
def own_core(measured: Sequence[int], others: Sequence[int]) -> Iterator[None]:
    """For the block, the processes `measured` (pids), of which one works at a time, have the last core for themselves
    and `others` share the rest. On a machine of one core nothing changes."""
    cores = os.sched_getaffinity(0)
    last = {max(cores)}
    if cores == last:
        yield
        return
    try:
        for pids, allowed in ((measured, last), (others, cores - last)):
            for pid in pids:
                _pin(pid, allowed)
        yield
    finally:
        for pid in (*measured, *others):
            _pin(pid, cores)


def _pin(pid: int, cores: set[int]) -> None:
    """All threads of a process, and with them those that they start."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        with suppress(ProcessLookupError):  # it has ended meanwhile
            os.sched_setaffinity(int(thread), cores)
