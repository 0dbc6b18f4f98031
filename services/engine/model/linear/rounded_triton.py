"""Linear layers with weights of eight bits on a GPU: few rows by a kernel of our own, many by torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from services.engine.model.linear import rounded_kernels as kernels
from services.engine.model.linear.rounded import Rounded, RoundedLinear

MOST_ROWS = 128  # that the kernel takes; for more, reading a weight twice costs little beside multiplying it
LEAST_ROWS = 16  # that tl.dot wants
BLOCK_IN, BLOCK_SUMS = 128, 512
# Outputs of a program and stages of its loop, by its rows: each program reads all rows anew, so many rows want few
# programs, and what is under way must fit into shared memory.
TILES = {16: (32, 4), 32: (64, 4), 64: (64, 4), 128: (128, 3)}
LEAST_OUT = 32
PROGRAMS, MOST_SPLITS = 512, 8  # programs that keep the memory of a large GPU busy
WARPS = 4


@dataclass(frozen=True, slots=True)
class _Cut:
    """How the inputs are cut: pieces, and inputs of each, a multiple of BLOCK_IN."""

    splits: int
    piece: int


class TritonRoundedLinear(RoundedLinear):
    """See Linear. Nothing waits for the device, so steps are queued and captured."""

    def __init__(self, weight: Rounded, bias: Tensor | None = None) -> None:
        super().__init__(weight, bias)
        self._cut = _cut(*weight.numbers.shape)

    def __call__(self, rows: Tensor) -> Tensor:
        """See Linear."""
        return super().__call__(rows) if rows.shape[0] > MOST_ROWS else self._few(rows.contiguous())

    def _few(self, rows: Tensor) -> Tensor:
        (num_rows, depth), num_out, cut = rows.shape, self.weight.numbers.shape[0], self._cut
        numbers, scales = self.weight.numbers, self.weight.scales
        bias = scales if self.bias is None else self.bias
        result = torch.empty(num_rows, num_out, dtype=rows.dtype, device=rows.device)
        sums = result
        if cut.splits > 1:
            sums = torch.empty(cut.splits, num_rows, num_out, dtype=torch.float32, device=rows.device)
        block_rows = max(triton.next_power_of_2(num_rows), LEAST_ROWS)
        block_out, stages = TILES[block_rows]
        kernels.multiply_few[(triton.cdiv(num_out, block_out), cut.splits)](
            rows, numbers, scales, bias, sums,
            num_rows, rows.stride(0),
            IN=depth, OUT=num_out, PIECE=cut.piece, SPLITS=cut.splits,
            BLOCK_ROWS=block_rows, BLOCK_OUT=block_out, BLOCK_IN=BLOCK_IN,
            HAS_BIAS=self.bias is not None, num_warps=WARPS, num_stages=stages, enable_fp_fusion=True,
        )  # fmt: skip
        if cut.splits > 1:
            kernels.add_sums[(num_rows, triton.cdiv(num_out, BLOCK_SUMS))](
                sums, scales, bias, result,
                num_rows,
                OUT=num_out, SPLITS=cut.splits, BLOCK_OUT=BLOCK_SUMS, HAS_BIAS=self.bias is not None,
                enable_fp_fusion=True,
            )  # fmt: skip
        return result


def _cut(num_out: int, depth: int) -> _Cut:
    blocks = triton.cdiv(depth, BLOCK_IN)
    splits = min(max(PROGRAMS // triton.cdiv(num_out, LEAST_OUT), 1), MOST_SPLITS, blocks)
    piece = triton.cdiv(blocks, splits)
    return _Cut(triton.cdiv(blocks, piece), piece * BLOCK_IN)
