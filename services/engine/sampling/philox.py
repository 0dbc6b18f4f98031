"""Random numbers as a function of a counter: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011). The same counter and key give the same number on any engine, in any batch, at any time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

ROUNDS = 10
MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], dtype=np.uint64)
KEY_STEPS = np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint64)  # golden ratio, square root of 3 less 1
LOW_WORD = np.uint64(0xFFFFFFFF)
WORD_BITS = np.uint64(32)


def philox(counters: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Four random 32-bit words for each row: counters (n, 4) and keys (n, 2) of 32-bit words; result (n, 4)."""
    words, key = counters.copy(), keys.copy()
    for _ in range(ROUNDS):
        products = words[:, [0, 2]] * MULTIPLIERS  # 64 bits each: high and low halves are used apart
        high, low = products >> WORD_BITS, products & LOW_WORD
        words = np.stack(
            (high[:, 1] ^ words[:, 1] ^ key[:, 0], low[:, 1], high[:, 0] ^ words[:, 3] ^ key[:, 1], low[:, 0]), axis=1
        )
        key = (key + KEY_STEPS) & LOW_WORD
    return words


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> NDArray[np.float64]:
    """One number in [0, 1) for each (64-bit seed, absolute position), 53 random bits each."""
    seed = np.array(seeds, dtype=np.uint64)
    position = np.array(positions, dtype=np.uint64)
    zero = np.zeros_like(position)
    counters = np.stack((position & LOW_WORD, position >> WORD_BITS, zero, zero), axis=1)
    words = philox(counters, np.stack((seed & LOW_WORD, seed >> WORD_BITS), axis=1))
    bits = (words[:, 0] << np.uint64(21)) ^ (words[:, 1] >> np.uint64(11))  # 32 + 21 bits
    return bits.astype(np.float64) * 2.0**-53
