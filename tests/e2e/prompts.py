"""Prompts of mixed length, made of token ids."""

from __future__ import annotations

import random


def mixed_prompts(count: int, vocab_size: int, longest: int, seed: int = 7) -> list[list[int]]:
    """`count` prompts of 2 to `longest` tokens, short ones and long ones in turn, all different."""
    rng = random.Random(seed)
    lengths = [2, 3, 15, 16, 17, 31, 33, longest // 2, longest - 1, longest]
    while len(lengths) < count:
        lengths.append(rng.randint(2, longest))
    return [[rng.randrange(3, vocab_size) for _ in range(length)] for length in lengths[:count]]
