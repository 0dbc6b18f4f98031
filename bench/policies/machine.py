"""What else the machine does while something is measured. Linux only."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path


class Machine:
    """Processor time of all, and of the processes that belong to the measurement."""

    def __init__(self, processes: Collection[int]) -> None:
        """`processes`: ids, beside this process; each with all of its threads."""
        self._processes = {os.getpid(), *processes}
        self._seen = self._read()

    def others(self) -> float:
        """Share of all processors that everybody else had since the last call, other guests of the host included."""
        before, self._seen = self._seen, self._read()
        total, idle, ours = (now - then for now, then in zip(self._seen, before, strict=True))
        return max(0.0, (total - idle - ours) / max(1, total))

    def _read(self) -> tuple[int, int, int]:
        """Clock ticks since the start: all, those without work, and ours."""
        ticks = [int(each) for each in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]
        return sum(ticks), ticks[3] + ticks[4], sum(map(_ticks, self._processes))


def _ticks(process: int) -> int:
    # The name, in parentheses, may hold anything; user and system time are the 14th and 15th field in all.
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
