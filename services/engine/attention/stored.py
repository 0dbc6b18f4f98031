"""Numbers as a KV pool keeps them: in the type that the model computes in, or as floats of eight bits.

float8_e4m3 has a sign, 4 bits of exponent and 3 of mantissa, no infinities, and 448 as its largest number. Every such
number is one of float16 and of bfloat16 too, so what is read is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
FLOAT8_CAPABILITY = (8, 9)  # the compute capability from which on GPUs convert these numbers


def as_stored(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` rounded to the nearest numbers of a pool's type. Of eight bits what is too large becomes the largest:
    a finite number never becomes NaN, as torch 2.11 alone would have it, and NaN stays NaN."""
    return values.clamp(-LARGEST, LARGEST).to(dtype) if dtype == FLOAT8 else values.to(dtype)


def as_indexed(values: Tensor) -> Tensor:
    """The same memory in a type that torch indexes on every device: floats of eight bits as bytes."""
    return values.view(torch.uint8) if values.dtype == FLOAT8 else values


def fill_with_nan(pool: Tensor, pages: Tensor) -> None:
    """Makes every number of some pages NaN, in a pool (num_layers, num_pages, ...)."""
    as_indexed(pool)[:, pages] = as_indexed(torch.full((), torch.nan, dtype=pool.dtype, device=pool.device))
