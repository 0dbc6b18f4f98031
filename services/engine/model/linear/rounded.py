"""Linear layers whose weights are bytes or 8-bit floats with a scale for each output, on any device, in plain torch.

What the activations are computed in (bfloat16, float16, float32) holds every such number exactly, so rounding the
weights is all that is lost.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # of an output without weights


@dataclass(frozen=True, slots=True)
class Rounded:
    """A weight: numbers times the scale of their output."""

    numbers: Tensor  # (out, in) int8 or float8_e4m3fn
    scales: Tensor  # (out,) float32


def rounded(weight: Tensor, kind: torch.dtype) -> Rounded:
    """weight (out, in) in numbers of `kind`, the largest of an output being the largest of `kind`."""
    largest, exact = LARGEST[kind], weight.float()
    scales = (exact.abs().amax(1) / largest).clamp_(min=SMALLEST_SCALE)
    numbers = (exact / scales[:, None]).clamp_(-largest, largest)
    return Rounded((numbers.round_() if kind == torch.int8 else numbers).to(kind), scales)


class RoundedLinear:
    """A layer that has its weight in the type of the rows while it multiplies: for many rows. See Linear."""

    def __init__(self, weight: Rounded, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, rows: Tensor) -> Tensor:
        """See Linear."""
        result = F.linear(rows, self.weight.numbers.to(rows.dtype)).mul_(self.weight.scales)
        return result if self.bias is None else result.add_(self.bias)
