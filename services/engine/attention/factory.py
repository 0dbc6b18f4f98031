"""The choice of an attention backend."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from services.engine.attention.backend import AttentionBackend
from services.engine.attention.gather_sdpa import GatherSdpaAttention
from services.engine.attention.oracle import OracleAttention
from services.engine.model.model import ModelShape


def _paged_numba(kv: Tensor, num_threads: int) -> AttentionBackend:
    # Here, because numba and its machine code take 0.3 s to load and engines on a GPU never need them.
    from services.engine.attention.paged_numba import PagedNumbaAttention

    return PagedNumbaAttention(kv, num_threads)


BACKENDS: dict[str, Callable[[Tensor, int], AttentionBackend]] = {
    "oracle": lambda kv, num_threads: OracleAttention(kv),
    "gather_sdpa": lambda kv, num_threads: GatherSdpaAttention(kv),
    "paged_numba": _paged_numba,
}


def make_attention(name: str | None, kv: Tensor, config: ModelShape, num_threads: int = 1) -> AttentionBackend:
    """The named backend over the pool `kv`; None takes the fastest for its device and dtype.

    Raises ValueError for an unknown name, one that cannot compute this pool, or a pool that is not the model's.
    """
    expected = (config.num_layers, 2, config.num_kv_heads, config.head_dim)
    if kv.dim() != 6 or (kv.shape[0], kv.shape[2], kv.shape[3], kv.shape[5]) != expected:
        raise ValueError(f"a KV pool of shape {tuple(kv.shape)} does not fit the model's {expected}")
    if name is None:
        name = "paged_numba" if kv.device.type == "cpu" and kv.dtype == torch.float32 else "gather_sdpa"
    if name not in BACKENDS:
        raise ValueError(f"unknown attention backend {name!r}; there are {', '.join(sorted(BACKENDS))}")
    return BACKENDS[name](kv, num_threads)
