"""The attention backends that there are, and which of them an engine tries."""

from __future__ import annotations

import torch
from torch import Tensor

from services.engine.attention.backend import AttentionBackend
from services.engine.attention.choice import Factory, choose
from services.engine.attention.gather_sdpa import GatherSdpaAttention
from services.engine.attention.oracle import OracleAttention
from services.engine.model.model import ModelShape


def _paged_numba(kv: Tensor, num_threads: int) -> AttentionBackend:
    # Here, because numba and its machine code take 0.3 s to load and engines on a GPU never need them.
    from services.engine.attention.paged_numba import PagedNumbaAttention

    return PagedNumbaAttention(kv, num_threads)


def _flash_attn(kv: Tensor, num_threads: int) -> AttentionBackend:
    from services.engine.attention.flash_attn import FlashAttnAttention

    return FlashAttnAttention(kv)


def _flash_attn_3(kv: Tensor, num_threads: int) -> AttentionBackend:
    from services.engine.attention.flash_attn_3 import FlashAttn3Attention

    return FlashAttn3Attention(kv)


def _flashinfer(kv: Tensor, num_threads: int) -> AttentionBackend:
    from services.engine.attention.flashinfer import FlashInferAttention

    return FlashInferAttention(kv)


def _torch_varlen(kv: Tensor, num_threads: int) -> AttentionBackend:
    from services.engine.attention.torch_varlen import TorchVarlenAttention

    return TorchVarlenAttention(kv)


def _triton_paged(kv: Tensor, num_threads: int) -> AttentionBackend:
    from services.engine.attention.triton_paged import TritonPagedAttention

    return TritonPagedAttention(kv)


def _triton_prefill(kv: Tensor, num_threads: int) -> AttentionBackend:
    from services.engine.attention.triton_prefill import TritonPrefillAttention

    return TritonPrefillAttention(kv)


BACKENDS: dict[str, Factory] = {
    "oracle": lambda kv, num_threads: OracleAttention(kv),
    "gather_sdpa": lambda kv, num_threads: GatherSdpaAttention(kv),
    "paged_numba": _paged_numba,
    "flash_attn": _flash_attn,
    "flash_attn_3": _flash_attn_3,
    "flashinfer": _flashinfer,
    "torch_varlen": _torch_varlen,
    "triton_paged": _triton_paged,
    "triton_prefill": _triton_prefill,
}


def check_name(name: str | None) -> None:
    """ValueError for a name that no backend has."""
    if name is not None and name not in BACKENDS:
        raise ValueError(f"unknown attention backend {name!r}; there are {', '.join(sorted(BACKENDS))}")


def make_attention(
    name: str | None, kv: Tensor, config: ModelShape, num_threads: int = 1, dtype: torch.dtype | None = None
) -> AttentionBackend:
    """The named backend over the pool `kv`; None: of those for its device and dtype the first that is right, or on a
    GPU the fastest.

    `dtype` is that of queries; None: the pool's.
    Raises ValueError for an unknown name, one that cannot compute this pool, or a pool that is not the model's; and
    where None stands for one that fails on the CPU.
    """
    expected = (config.num_layers, 2, config.num_kv_heads, config.head_dim)
    if kv.dim() != 6 or (kv.shape[0], kv.shape[2], kv.shape[3], kv.shape[5]) != expected:
        raise ValueError(f"a KV pool of shape {tuple(kv.shape)} does not fit the model's {expected}")
    if name is None:
        candidates = {name: BACKENDS[name] for name in _candidates(kv)}
        # Engines on the CPU compute the same numbers whatever else their machine does when they start.
        on_gpu = kv.device.type == "cuda"
        return choose(candidates, kv, config.num_heads, num_threads, dtype or kv.dtype, by_speed=on_gpu)
    check_name(name)
    return BACKENDS[name](kv, num_threads)


def _candidates(kv: Tensor) -> tuple[str, ...]:
    """Names in order of preference; the last one computes everywhere."""
    if kv.device.type == "cpu" and kv.dtype == torch.float32:
        return "paged_numba", "gather_sdpa"
    if kv.device.type == "cuda":
        libraries = "flash_attn_3", "flash_attn", "flashinfer", "torch_varlen"
        return *libraries, "triton_prefill", "triton_paged", "gather_sdpa"
    return ("gather_sdpa",)
