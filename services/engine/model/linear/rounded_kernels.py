"""Products of a few rows with weights of eight bits, on a GPU, in Triton: a weight is read once and never written.

Sums are float32; how inputs are cut into pieces follows from the weight's shape alone. The order within a piece, which
follows from the number of rows, and torch's products of many rows may round otherwise.
"""

from __future__ import annotations

import triton
import triton.language as tl


# One kernel for any number of rows up to BLOCK_ROWS: each takes most of a second to compile.
@triton.jit(do_not_specialize=["num_rows"])
def multiply_few(
    rows, numbers, scales, bias, result,
    num_rows, row_stride,
    IN: tl.constexpr, OUT: tl.constexpr, PIECE: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_OUT outputs of all rows (num_rows, IN), over one of SPLITS pieces of PIECE inputs.

    numbers (OUT, IN). With one piece `result` is (num_rows, OUT), in the type of the rows; with more it is the pieces'
    sums, (SPLITS, num_rows, OUT) float32, for add_sums.
    """
    row, piece = tl.arange(0, BLOCK_ROWS).to(tl.int64), tl.program_id(1)
    out = tl.program_id(0).to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    has_row, has_out = row < num_rows, out < OUT
    sums = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
    for start in range(0, PIECE, BLOCK_IN):
        element = piece * PIECE + start + tl.arange(0, BLOCK_IN)
        inside = element < IN
        values = tl.load(
            rows + row[:, None] * row_stride + element[None, :], mask=has_row[:, None] & inside[None, :], other=0.0
        )
        weight = tl.load(
            numbers + out[:, None] * IN + element[None, :], mask=has_out[:, None] & inside[None, :], other=0.0
        )
        sums += tl.dot(values, tl.trans(weight.to(values.dtype)), input_precision="ieee")
    place = row[:, None] * OUT + out[None, :]
    wanted = has_row[:, None] & has_out[None, :]
    if SPLITS == 1:
        sums *= tl.load(scales + out, mask=has_out, other=0.0)[None, :]
        if HAS_BIAS:
            sums += tl.load(bias + out, mask=has_out, other=0.0).to(tl.float32)[None, :]
        tl.store(result + place, sums.to(result.dtype.element_ty), mask=wanted)
    else:
        tl.store(result + piece.to(tl.int64) * num_rows * OUT + place, sums, mask=wanted)


@triton.jit(do_not_specialize=["num_rows"])
def add_sums(
    sums, scales, bias, result,
    num_rows,
    OUT: tl.constexpr, SPLITS: tl.constexpr, BLOCK_OUT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_OUT outputs of one row, of the pieces that multiply_few left: added, scaled and rounded."""
    row = tl.program_id(0).to(tl.int64)
    out = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    has_out = out < OUT
    total = tl.zeros((BLOCK_OUT,), tl.float32)
    for piece in tl.static_range(SPLITS):
        total += tl.load(sums + (piece * num_rows + row) * OUT + out, mask=has_out, other=0.0)
    total *= tl.load(scales + out, mask=has_out, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + out, mask=has_out, other=0.0).to(tl.float32)
    tl.store(result + row * OUT + out, total.to(result.dtype.element_ty), mask=has_out)
