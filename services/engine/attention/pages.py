"""Addressing of the KV pool in plain torch, shared by the backends that need no kernel of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from services.engine.attention.stored import as_indexed, as_stored


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A copy of `values`, which are on the CPU, queued on a GPU without waiting for what that does already."""
    if device.type != "cuda" or not values.numel():
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


class PagedKv:
    """The pool (num_layers, num_pages, 2, num_kv_heads, page_size, head_dim) and the scatter of new KV into it."""

    def __init__(self, kv: Tensor) -> None:
        if kv.dim() != 6 or kv.shape[2] != 2:
            raise ValueError(f"the KV pool must be (layers, pages, 2, heads, page_size, head_dim), not {kv.shape}")
        self.kv = kv
        self.page_size = kv.shape[4]
        self.head_dim = kv.shape[5]

    def write(self, layer: int, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Stores key and value, each (num_tokens, num_kv_heads, head_dim), at slots (num_tokens,) int64."""
        pages, offsets = slots // self.page_size, slots % self.page_size
        pool = as_indexed(self.kv[layer])
        pool[pages, 0, :, offsets] = as_indexed(as_stored(key, self.kv.dtype))
        pool[pages, 1, :, offsets] = as_indexed(as_stored(value, self.kv.dtype))

    def read_pages(self, layer: int, pages: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy of some pages of a layer as numbers of `dtype`: (*pages.shape, 2, kv_heads, page_size, head_dim)."""
        return as_indexed(self.kv[layer])[pages].view(self.kv.dtype).to(dtype)
