"""What the tests of backends for GPUs share: the start-up problem at several shapes, and the mixed batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from services.engine.attention.backend import AttentionBackend
from services.engine.attention.problem import TOLERANCES, Problem
from tests.engine.attention.test_conformance import FORMS, LAYERS, MIXED, Pool

SHAPES = [(4, 2, 64), (6, 2, 80), (8, 8, 128), (32, 8, 128)]  # heads, kv heads, elements of a head


def check_problem(
    make: Callable[[Tensor], AttentionBackend],
    device: str,
    dtype: torch.dtype,
    page_size: int,
    shape: tuple[int, ...],
    kv_dtype: torch.dtype | None = None,
) -> None:
    """The self-test of an engine's start. `kv_dtype`: None is `dtype`."""
    num_heads, num_kv_heads, head_dim = shape
    kv = torch.zeros(1, 1, 2, num_kv_heads, page_size, head_dim, dtype=kv_dtype or dtype, device=device)
    problem = Problem(kv, num_heads, dtype)
    problem.check(make(problem.kv))


def check_mixed(
    make: Callable[[Tensor], AttentionBackend],
    device: str,
    dtype: torch.dtype,
    page_size: int,
    form: str,
    kv_dtype: torch.dtype | None = None,
) -> None:
    """Decoding, whole prompts and chunks in one batch, over pages that hold NaN elsewhere."""
    kv_dtype = kv_dtype or dtype
    pool = Pool(MIXED, page_size)
    pool.kv = pool.kv.to(device, kv_dtype)
    backend = make(pool.kv)
    for sequence in range(len(MIXED)):
        for parts in (pool.keys, pool.values):
            parts[sequence] = parts[sequence].to(dtype).to(kv_dtype).float()  # what the pool can hold
        for layer in range(LAYERS):
            key, value = (parts[sequence][layer].to(device, dtype) for parts in (pool.keys, pool.values))
            backend.write(layer, key, value, pool.slots(sequence).to(device))
    pool.query = pool.query.to(dtype).float()
    batch = pool.batch(range(len(MIXED)), device)
    actual = backend.attend(1, pool.query.to(device, dtype), batch, FORMS[form]).cpu().float()
    expected = torch.cat([pool.expected(1, sequence, FORMS[form]) for sequence in range(len(MIXED))])
    assert (actual - expected).abs().max() < TOLERANCES[dtype]
