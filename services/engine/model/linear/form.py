"""How linear layers keep their weights."""

from __future__ import annotations

from enum import Enum


class WeightForm(Enum):
    """How linear layers keep their weights."""

    EXACT = "exact"  # in the dtype that the model computes in
    BYTES = "bytes"  # rounded to bytes
    FLOATS8 = "floats8"  # rounded to floats of eight bits (e4m3)
    PACKED = "packed"  # in the blocks of four or eight bits that a GGUF file has; rounded to bytes where it has none
    PACKED_16 = "packed16"  # the same, and rows are rounded to two bytes where the forms above it take one


# Compute capabilities from which on GPUs have what a form of weights is multiplied in; they need none for the others.
NEEDED = {WeightForm.BYTES: (8, 0), WeightForm.FLOATS8: (8, 9)}
