"""Functions of one float32 that LLVM makes vector instructions of, as it does not of calls into a library."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from services.engine.kernels.machine_code import compiled
from services.engine.kernels.memory import as_float

LOG2_E = math.log2(math.e)
_LOG2_E = np.float32(LOG2_E)
# 2 ** f is about 1 + f * (... + f * (... + f * first)) for |f| <= 1/2 (Cephes' exp2f).
POLYNOMIAL_OF_2 = (
    1.535336188319500e-4,
    1.339887440266574e-3,
    9.618437357674640e-3,
    5.550332471162809e-2,
    2.402264791363012e-1,
    6.931472028550421e-1,
)
_C5, _C4, _C3, _C2, _C1, _C0 = (np.float32(coefficient) for coefficient in POLYNOMIAL_OF_2)


@compiled
def power_of_2(exponent: Any) -> Any:
    """2 ** exponent in float32, relative error 2e-7; exponents beyond -126 and 126 count as these.

    2 ** x is 2 ** n * 2 ** f with |f| <= 1/2: n goes into the exponent bits of a float, a polynomial gives 2 ** f.
    """
    power = min(max(exponent, np.float32(-126)), np.float32(126))
    whole = np.int32(power + np.float32(126.5)) - np.int32(126)
    part = power - np.float32(whole)
    value = ((((_C5 * part + _C4) * part + _C3) * part + _C2) * part + _C1) * part + _C0
    return (value * part + np.float32(1)) * as_float((whole + np.int32(127)) << np.int32(23))


@compiled
def sigmoid(value: Any) -> Any:
    """1 / (1 + exp(-value)) in float32."""
    return np.float32(1) / (np.float32(1) + power_of_2(-value * _LOG2_E))


@compiled
def tanh(value: Any) -> Any:
    """The hyperbolic tangent in float32."""
    return np.float32(1) - np.float32(2) * sigmoid(np.float32(-2) * value)
