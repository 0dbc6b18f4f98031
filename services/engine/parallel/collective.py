"""The ranks of a replica as torch.distributed joins them: NCCL between GPUs, gloo between CPUs."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

# A step lasts seconds at most; a rank that is not there by then will not come.
TIMEOUT = timedelta(seconds=60)


class TorchCollective:
    """This process's place in the group. There is one a process, and it lasts as long as the process."""

    def __init__(self, meeting_place: int, rank: int, count: int, device: torch.device) -> None:
        """Blocks until all ranks have come to `meeting_place`, a descriptor of an empty file in memory. It stays open
        for good: torch opens it by its number again when the process ends.

        Raises RuntimeError if they do not come in time.
        """
        # Where the machine's own name leads is anybody's guess; ranks of one replica are on one node.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        self._rank, self._count = rank, count
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.FileStore(f"/proc/self/fd/{meeting_place}", count),  # type: ignore[attr-defined]
            rank=rank,
            world_size=count,
            timeout=TIMEOUT,
        )
        # NCCL connects with the first collective: whoever does not come is missed here.
        self.add(torch.zeros(1, device=device))

    def add(self, values: Tensor) -> None:
        """See Collective."""
        dist.all_reduce(values)

    def collect(self, values: Tensor) -> Tensor:
        """See Collective."""
        if self._rank != 0:
            dist.gather(values, dst=0)
            return values
        parts = [torch.empty_like(values) for _ in range(self._count)]
        dist.gather(values, parts, dst=0)
        return torch.cat(parts, dim=1)
