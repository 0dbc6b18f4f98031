"""Bytes that tell where they came from."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# What a page holds that nobody may have written.
POISON = 0xA5


def pattern(seed: int, size_bytes: int) -> NDArray[np.uint8]:
    """Bytes that differ from place to place and from seed to seed, and are never 0 or POISON."""
    values = np.random.default_rng(seed).integers(1, 255, size_bytes, np.uint8)
    values[values == POISON] = 255
    return values
