"""Floats of eight bits in Triton's interpreter: torch converts them in its place.

Its own conversion drops the carry when it rounds (31.7 becomes 16, not 32), cuts off what is subnormal, and reads NaN
as 480. A GPU converts by an instruction of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from services.engine.attention.stored import FLOAT8

_WIDE = {16: torch.float16, 32: torch.float32, 64: torch.float64}


def convert_rightly(patch: pytest.MonkeyPatch) -> None:
    """Until `patch` is undone."""
    import triton.language as tl
    from triton.runtime import interpreter

    as_it_came = interpreter._convert_float

    def convert(values: NDArray[Any], source: Any, target: Any, rounding: Any) -> NDArray[Any]:
        is_float8 = source == tl.float8e4nv, target == tl.float8e4nv
        other = target if is_float8[0] else source
        if not any(is_float8) or all(is_float8) or other == tl.bfloat16:
            return as_it_came(values, source, target, rounding)
        wide = _WIDE[other.primitive_bitwidth]
        bits = torch.from_numpy(np.frombuffer(values.tobytes(), dtype=np.uint8).copy())
        converted = bits.view(FLOAT8).to(wide) if is_float8[0] else bits.view(wide).to(FLOAT8)
        raw = converted.contiguous().view(torch.uint8).numpy()
        return raw.view(f"u{converted.element_size()}").reshape(values.shape)

    patch.setattr(interpreter, "_convert_float", convert)
