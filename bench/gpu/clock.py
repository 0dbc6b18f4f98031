"""Times of what a device computes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def finish(device: torch.device) -> None:
    """Waits for all that is queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_s(work: Callable[[], object], device: torch.device, *, repeats: int = 10, warm_ups: int = 3) -> float:
    """Median seconds of one call, by the device's own events on a GPU."""
    for _ in range(warm_ups):
        work()
    finish(device)
    return statistics.median(_once(work, device) for _ in range(repeats))


def _once(work: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3
