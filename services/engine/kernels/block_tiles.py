"""Products of small tiles of whole numbers in blocks, with a scale for each block.

Rows are rounded to signed bytes, GROUP of them with a scale of their own. Weights are blocks of GROUP of k: bytes or
nibbles, a scale and for nibbles a minimum for each column, so that a weight is scale * number + minimum. A block of a
panel, 16 columns side by side, is one piece of memory, and the blocks of a tile follow each other as they are used:
for each block of k, its panels.

bytes (BYTE_BLOCK of memory): 8 vectors of four k of each column, each number plus 128; 16 scales.
nibbles (NIBBLE_BLOCK): 4 vectors, their low halves the first sixteen k, the high halves the last; 16 scales; 16
minimums.

Scales and minimums are float16, to be multiplied by one power of two for the whole matrix. Sums within a block are
exact, those over blocks in order, so the bits of a row's result are its own whatever the tile.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from services.engine.kernels.machine_code import intrinsic
from services.engine.kernels.writer import FLOAT, FLOATS, INT8, INT32, INTS, LANES, Writer, int64

GROUP = 32  # of k that share a scale
SCALE_BYTES = 12  # of each group of a row: its scale, -128 times the sum of its bytes (int32), and scale times that sum
_HALVES = 2 * LANES  # bytes of 16 scales
BYTE_BLOCK = GROUP * LANES + _HALVES
NIBBLE_BLOCK = GROUP * LANES // 2 + 2 * _HALVES
_AHEAD = 2048  # bytes between what is computed with and what is fetched from memory
_LINE = 64


def byte_tile(rows: int, panels: int) -> Any:
    """An intrinsic: out (rows, 16 * panels) = rows of bytes times a tile of bytes; see _tile."""
    return _tile(rows, panels, BYTE_BLOCK, has_minimums=False)


def nibble_tile(rows: int, panels: int) -> Any:
    """An intrinsic: out (rows, 16 * panels) = rows of bytes times a tile of nibbles; see _tile."""
    return _tile(rows, panels, NIBBLE_BLOCK, has_minimums=True)


def _tile(rows: int, panels: int, block_bytes: int, *, has_minimums: bool) -> Any:
    """(left, left_row_stride, scales, scales_row_stride, right, num_groups, factor, out, out_row_stride).

    Addresses and bytes; the factor is the bits of a float32. Of each row and group `scales` has SCALE_BYTES.
    """

    @intrinsic
    def tile(typing_context: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any, i: Any) -> Any:
        def build(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
            left, left_row, scales, scales_row, right, num_groups, factor, out, out_row = arguments
            write = Writer(builder)

            def group(index: ir.Value, totals: list[ir.Value]) -> list[ir.Value]:
                at_left = builder.add(left, builder.mul(index, int64(GROUP)))
                at_right = builder.add(right, builder.mul(index, int64(panels * block_bytes)))
                at_scales = builder.add(scales, builder.mul(index, int64(SCALE_BYTES)))
                for line in range(0, panels * block_bytes, _LINE):
                    write.prefetch(builder.add(at_right, int64(line + _AHEAD)))
                rows_at = [write.address(at_scales, row, scales_row) for row in range(rows)]
                if has_minimums:
                    sums = [ir.Constant(INTS, None)] * (rows * panels)
                else:
                    offsets = [write.load(builder.add(address, int64(4)), INT32) for address in rows_at]
                    sums = [write.spread(offset, INTS) for offset in offsets for _ in range(panels)]
                for first in range(0, GROUP // 2 if has_minimums else GROUP, 4):
                    at = builder.add(at_right, int64(LANES * first))
                    loaded = [write.load(write.address(at, panel, block_bytes), INTS) for panel in range(panels)]
                    parts = [(first, loaded)]
                    if has_minimums:
                        parts = list(zip((first, first + GROUP // 2), write.nibbles(loaded), strict=True))
                    for k, columns in parts:
                        for row in range(rows):
                            address = builder.add(write.address(at_left, row, left_row), int64(k))
                            signed = write.spread(write.load(address, INT32), INTS)
                            for panel in range(panels):
                                n = row * panels + panel
                                sums[n] = write.add_byte_products(sums[n], columns[panel], signed)
                at = builder.add(at_right, int64(GROUP * LANES // (2 if has_minimums else 1)))
                of_columns = [write.halves(write.address(at, panel, block_bytes)) for panel in range(panels)]
                of_rows = [write.spread(write.load(address, FLOAT), FLOATS) for address in rows_at]
                totals = [
                    write.multiply_add(
                        builder.sitofp(sums[n], FLOATS),
                        builder.fmul(of_rows[n // panels], of_columns[n % panels]),
                        total,
                    )
                    for n, total in enumerate(totals)
                ]
                if not has_minimums:
                    return totals
                at = builder.add(at, int64(_HALVES))
                minimums = [write.halves(write.address(at, panel, block_bytes)) for panel in range(panels)]
                weights = [write.spread(write.load(builder.add(each, int64(8)), FLOAT), FLOATS) for each in rows_at]
                return [
                    write.multiply_add(weights[n // panels], minimums[n % panels], total)
                    for n, total in enumerate(totals)
                ]

            totals = write.loop(num_groups, [ir.Constant(FLOATS, None)] * (rows * panels), group)
            spread = write.spread(builder.bitcast(builder.trunc(factor, INT32), FLOAT), FLOATS)
            for n, total in enumerate(totals):
                target = write.address(write.address(out, n // panels, out_row), n % panels, 4 * LANES)
                write.store(builder.fmul(total, spread), target)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), build

    return tile


@intrinsic
def quantise_group(typing_context: Any, values: Any, quantised: Any, scale: Any) -> Any:
    """GROUP float32 at `values` to signed bytes at `quantised`, by address; SCALE_BYTES at `scale`.

    The largest magnitude becomes 127; the others are rounded to the nearest, halves to even.
    """

    def build(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        values, quantised, scale = arguments
        write = Writer(builder)
        vectors = [write.load(builder.add(values, int64(4 * lane)), FLOATS) for lane in range(0, GROUP, LANES)]
        first, second = (write.call(f"llvm.fabs.v{LANES}f32", FLOATS, vector) for vector in vectors)
        magnitudes = write.call(f"llvm.maxnum.v{LANES}f32", FLOATS, first, second)
        largest = write.reduce("fmax", magnitudes, FLOAT)
        limit, zero = ir.Constant(FLOAT, 127.0), ir.Constant(FLOAT, 0.0)
        is_zero = builder.fcmp_ordered("==", largest, zero)
        factor = write.spread(builder.select(is_zero, zero, builder.fdiv(limit, largest)), FLOATS)
        total = ir.Constant(INTS, None)
        for number, vector in enumerate(vectors):
            rounded = write.call(f"llvm.rint.v{LANES}f32", FLOATS, builder.fmul(vector, factor))
            whole = builder.fptosi(rounded, INTS)
            total = builder.add(total, whole)
            narrow = builder.trunc(whole, ir.VectorType(INT8, LANES))
            write.store(narrow, builder.add(quantised, int64(LANES * number)))
        count, step = write.reduce("add", total, INT32), builder.fdiv(largest, limit)
        write.store(step, scale)
        write.store(builder.mul(count, ir.Constant(INT32, -128)), builder.add(scale, int64(4)))
        write.store(builder.fmul(step, builder.sitofp(count, FLOAT)), builder.add(scale, int64(8)))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), build
