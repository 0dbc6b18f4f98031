"""Weights in blocks: 32 numbers of one output in a row, and what makes values of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 32  # inputs of a block, in GGUF and here
_LARGEST_BYTE = 127
_LARGEST_HALF = 65504.0


@dataclass(frozen=True, slots=True)
class Blocks:
    """A weight (out, in) in blocks of 32 inputs; the last is filled up.

    A value is (scale * number + minimum) * factor. Numbers are int8, (out, blocks, 32), without minimums; or, two to a
    byte, (out, blocks, 16) uint8 of 0 to 15: input i of a block in the low half of byte i, i + 16 in its high half.
    """

    depth: int  # inputs
    numbers: Tensor
    scales: Tensor  # (out, blocks) float16
    minimums: Tensor | None = None  # (out, blocks) float16, of numbers of four bits
    factor: float = 1.0  # a power of two

    def part(self, rows: slice) -> Blocks:
        """Some outputs."""
        minimums = None if self.minimums is None else self.minimums[rows]
        return replace(self, numbers=self.numbers[rows], scales=self.scales[rows], minimums=minimums)

    def inputs(self, columns: slice) -> Blocks:
        """Some inputs; the slice begins and ends with blocks."""
        blocks = slice(columns.start // BLOCK, columns.stop // BLOCK)
        minimums = None if self.minimums is None else self.minimums[:, blocks]
        depth = columns.stop - columns.start
        return replace(
            self, depth=depth, numbers=self.numbers[:, blocks], scales=self.scales[:, blocks], minimums=minimums
        )

    @property
    def num_columns(self) -> int:
        """Outputs."""
        return self.numbers.shape[0]

    @property
    def num_groups(self) -> int:
        """Blocks of an output."""
        return self.numbers.shape[1]

    def values(self) -> Tensor:
        """The weight in float32, (out, in)."""
        numbers, scales = self.numbers, self.scales.float()[..., None]
        if self.minimums is None:
            values = numbers.float() * scales
        else:
            values = torch.cat((numbers & 15, numbers >> 4), dim=-1) * scales + self.minimums.float()[..., None]
        return (values.flatten(1) * self.factor)[:, : self.depth]


def blocks_of(weight: Tensor) -> Blocks:
    """A weight (out, in) rounded to bytes, the largest of each block to 127.

    float16 holds scales over nine orders of magnitude, the factor puts the largest of them near its end.
    """
    grouped = F.pad(weight.float(), (0, -weight.shape[1] % BLOCK)).view(weight.shape[0], -1, BLOCK)
    exact = grouped.abs().amax(-1) / _LARGEST_BYTE
    largest = float(exact.max())
    factor = 2.0 ** math.ceil(math.log2(largest / _LARGEST_HALF)) if largest > 0 else 1.0
    scales = (exact / factor).to(torch.float16)
    steps = (scales.float() * factor).clamp_min(torch.finfo(torch.float32).tiny)
    numbers = (grouped / steps[..., None]).round_().clamp_(-_LARGEST_BYTE, _LARGEST_BYTE).to(torch.int8)
    return Blocks(weight.shape[1], numbers, scales, None, factor)


def stacked(parts: Sequence[Blocks]) -> Blocks:
    """One under the other; all of one depth, kind and factor."""
    first = parts[0]
    minimums = [part.minimums for part in parts if part.minimums is not None]
    return replace(
        first,
        numbers=torch.cat([part.numbers for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        minimums=torch.cat(minimums) if minimums else None,
    )
