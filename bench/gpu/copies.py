"""Scattered pages from one pool of a GPU into another, by the ways that the KV transfer service has."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import numpy as np

from services.kvtransfer.transports.cuda_ipc.copies import RunCopier
from services.kvtransfer.transports.cuda_ipc.device import CudaDevice
from services.kvtransfer.transports.cuda_ipc.kernel_trial import choose_kernel
from services.kvtransfer.transports.cuda_ipc.runs import RunList
from services.rpc.cuda_driver import CudaDriver


@dataclass(frozen=True, slots=True)
class Pools:
    """Two pools of one arrangement, by the addresses where they begin."""

    source: int
    target: int
    layer_count: int
    page_count: int
    page_bytes: int  # of a page of one layer

    @property
    def layer_bytes(self) -> int:
        return self.page_count * self.page_bytes


def copy_figures(driver: CudaDriver, pools: Pools, bytes_per_s: float, repeats: int = 10) -> dict[str, float]:
    """Shares of the copy bandwidth, reading and writing counted: layer after layer as a push copies them, its waiting
    included. `kernel` in one launch, `runs` with a call of the driver a page, `plain` the same bytes in one piece."""
    kernel, way = choose_kernel(driver)
    print(f"pages are copied {way}", flush=True)
    device, page_bytes = CudaDevice(driver), pools.page_bytes
    places = np.random.default_rng(0).permutation(pools.page_count).tolist()
    scattered = RunList.of([(place * page_bytes, index * page_bytes, page_bytes) for index, place in enumerate(places)])
    runs, plain = RunCopier(device, 1, None), RunList.of([(0, 0, pools.layer_bytes)])
    ways = {"runs": (runs, scattered), "plain": (runs, plain)}
    if kernel is not None:
        ways["kernel"] = RunCopier(device, 1, kernel), scattered
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, (copier, listed) in ways.items():
            seconds[name].append(_all_layers(copier, listed, pools))
    figures = {}
    for name, took in seconds.items():
        speed = pools.layer_count * pools.layer_bytes / statistics.median(took[1:])  # the first one warms up
        figures[f"kv_copy_{name}_gb_per_s"] = speed / 1e9
        figures[f"kv_copy_{name}_share"] = 2 * speed / bytes_per_s
    return figures


def _all_layers(copier: RunCopier, runs: RunList, pools: Pools) -> float:
    began = time.perf_counter()
    for layer in range(pools.layer_count):
        begin = layer * pools.layer_bytes
        copier.copy(runs, pools.target + begin, pools.source + begin)
    return time.perf_counter() - began
