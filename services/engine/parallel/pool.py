"""A rank's part of a pool: its heads, in memory that all share or in memory of its own."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from services.engine.model.shard import Shard
from services.rpc.pool_client import is_allocated, map_shared


def pool_part(
    shape: tuple[int, ...], shard: Shard, device: torch.device, dtype: torch.dtype, descriptor: int | None
) -> Tensor:
    """The heads of `shard` in a pool of `shape`, (layers, pages, 2, kv_heads, page_size, head_dim).

    The descriptor is taken over; without one the memory is new and zero. With one, every rank writes into the same
    pages, so whoever else reads the pool sees that of a model in one piece. Raises OSError if it cannot be mapped.
    """
    heads = shard.part(shape[3])
    if descriptor is None:
        own = (*shape[:3], heads.stop - heads.start, *shape[4:])
        return torch.zeros(own, dtype=dtype, device=device)
    try:
        size_bytes = math.prod(shape) * dtype.itemsize
        memory = map_shared(descriptor, size_bytes, prefault=is_allocated(descriptor, size_bytes))
    finally:
        os.close(descriptor)
    return torch.from_numpy(memory).view(dtype).view(shape)[:, :, :, heads]
