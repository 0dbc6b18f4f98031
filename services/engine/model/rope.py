"""Rotary positions (Su et al., RoFormer, arXiv 2104.09864) in the half-split arrangement of transformers.

All in float32 and in the order of transformers, as models are trained: at position 3,000 the last bit of a frequency
moves logits by 1e-4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from services.engine.model.rope_config import RopeConfig


class RotaryTable:
    """Cosines and sines of every position, float32, computed once: (max_context, 1, head_dim) each."""

    def __init__(self, rope: RopeConfig, head_dim: int, max_context: int, device: torch.device) -> None:
        angles = torch.arange(max_context).float()[:, None] * frequencies(rope, head_dim)
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        self.cosine = angles.cos().to(device)
        self.sine = angles.sin().to(device)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rows for positions (num_tokens,): two of (num_tokens, 1, head_dim)."""
        return self.cosine[positions], self.sine[positions]


def rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions on (num_tokens, heads, head_dim); element i pairs with i + head_dim / 2."""
    values = heads.float()
    first, second = values.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (values * cosine).addcmul_(turned, sine).to(heads.dtype)


def frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """(head_dim / 2,) float32 radians a position.

    llama3 (Llama 3.1) keeps wavelengths below original / high_freq_factor, stretches those above
    original / low_freq_factor by `factor`, and blends in between.
    """
    plain = plain_frequencies(rope, head_dim)
    if rope.kind != "llama3":
        return plain / rope.factor
    turns = rope.original_max_context / (2 * math.pi / plain)  # within the context of the original training
    blend = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return (1 - blend) * plain / rope.factor + blend * plain


def plain_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """The same without stretching."""
    exponents = torch.arange(0, head_dim, 2).float() / head_dim
    return 1 / rope.theta**exponents
