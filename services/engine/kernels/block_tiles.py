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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types

from services.engine.kernels.machine_code import intrinsic
from services.engine.kernels.writer import FLOAT, FLOATS, INT8, INT32, INTS, LANES, Writer, int64

GROUP = 32  # of k that share a scale
SCALE_BYTES = 12  # of each group of a row: its scale, -128 times the sum of its bytes (int32), and scale times that sum
_HALVES = 2 * LANES  # bytes of 16 scales
_AHEAD = 2048  # bytes between what is computed with and what is fetched from memory
_LINE = 64


@dataclass(frozen=True, slots=True)
class _Form:
    """What a block of a panel consists of: numbers, 16 scales, and 16 minimums if it has them."""

    number_bytes: int
    has_minimums: bool

    @property
    def block_bytes(self) -> int:
        """All of a block."""
        return self.number_bytes + (2 if self.has_minimums else 1) * _HALVES


_BYTES = _Form(GROUP * LANES, has_minimums=False)
_NIBBLES = _Form(GROUP * LANES // 2, has_minimums=True)
BYTE_BLOCK, NIBBLE_BLOCK = _BYTES.block_bytes, _NIBBLES.block_bytes


def byte_tile(rows: int, panels: int) -> Any:
    """An intrinsic: out (rows, 16 * panels) = rows of bytes times a tile of bytes; see _tile."""
    return _tile(rows, panels, _BYTES)


def nibble_tile(rows: int, panels: int) -> Any:
    """An intrinsic: out (rows, 16 * panels) = rows of bytes times a tile of nibbles; see _tile."""
    return _tile(rows, panels, _NIBBLES)


def _tile(rows: int, panels: int, form: _Form) -> Any:
    """(left, left_row_stride, scales, scales_row_stride, right, num_groups, factor, out, out_row_stride).

    Addresses and bytes; the factor is the bits of a float32. Of each row and group `scales` has SCALE_BYTES.
    """

    @intrinsic
    def tile(typing_context: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any, i: Any) -> Any:
        def build(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
            left, left_row, scales, scales_row, right, num_groups, factor, out, out_row = arguments
            write = Writer(builder)

            def group(index: ir.Value, totals: list[ir.Value]) -> list[ir.Value]:
                at = [
                    builder.add(base, builder.mul(index, int64(step)))
                    for base, step in ((left, GROUP), (scales, SCALE_BYTES), (right, panels * form.block_bytes))
                ]
                numbers = [write.address(at[0], row, left_row) for row in range(rows)]
                of_rows = [write.address(at[1], row, scales_row) for row in range(rows)]
                blocks = [write.address(at[2], panel, form.block_bytes) for panel in range(panels)]
                for line in range(0, panels * form.block_bytes, _LINE):
                    write.prefetch(builder.add(at[2], int64(line + _AHEAD)))
                sums = _sums(write, form, numbers, of_rows, blocks)
                return _scaled(write, form, sums, totals, of_rows, blocks)

            totals = write.loop(num_groups, [ir.Constant(FLOATS, None)] * (rows * panels), group)
            spread = write.spread(builder.bitcast(builder.trunc(factor, INT32), FLOAT), FLOATS)
            for n, total in enumerate(totals):
                target = write.address(write.address(out, n // panels, out_row), n % panels, 4 * LANES)
                write.store(builder.fmul(total, spread), target)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), build

    return tile


def _columns(write: Writer, form: _Form, blocks: Sequence[ir.Value]) -> Iterator[tuple[int, list[ir.Value]]]:
    """For each four of k the first of them, and a vector of each block's panel."""
    for first in range(0, form.number_bytes // LANES, 4):
        loaded = [write.load(write.builder.add(block, int64(LANES * first)), INTS) for block in blocks]
        if form.has_minimums:
            low, high = write.nibbles(loaded)
            yield first, low
            yield first + GROUP // 2, high
        else:
            yield first, loaded


def _sums(
    write: Writer, form: _Form, numbers: Sequence[ir.Value], of_rows: Sequence[ir.Value], blocks: Sequence[ir.Value]
) -> list[ir.Value]:
    """Sums of the products of numbers within a group, row by row and panel by panel, int32 and exact."""
    builder = write.builder
    starts = [ir.Constant(INTS, None)] * len(numbers)
    if not form.has_minimums:  # bytes are stored plus 128
        starts = [write.spread(write.load(builder.add(each, int64(4)), INT32), INTS) for each in of_rows]
    sums = [start for start in starts for _ in blocks]
    for k, columns in _columns(write, form, blocks):
        for row, address in enumerate(numbers):
            signed = write.spread(write.load(builder.add(address, int64(k)), INT32), INTS)
            for n, column in enumerate(columns, row * len(blocks)):
                sums[n] = write.add_byte_products(sums[n], column, signed)
    return sums


def _scaled(
    write: Writer,
    form: _Form,
    sums: Sequence[ir.Value],
    totals: Sequence[ir.Value],
    of_rows: Sequence[ir.Value],
    blocks: Sequence[ir.Value],
) -> list[ir.Value]:
    """The totals plus a group's sums in float32."""
    builder, panels = write.builder, len(blocks)
    columns = [write.halves(builder.add(block, int64(form.number_bytes))) for block in blocks]
    rows = [write.spread(write.load(address, FLOAT), FLOATS) for address in of_rows]
    scaled = [
        write.multiply_add(builder.sitofp(sums[n], FLOATS), builder.fmul(rows[n // panels], columns[n % panels]), total)
        for n, total in enumerate(totals)
    ]
    if not form.has_minimums:
        return scaled
    minimums = [write.halves(builder.add(block, int64(form.number_bytes + _HALVES))) for block in blocks]
    weights = [write.spread(write.load(builder.add(address, int64(8)), FLOAT), FLOATS) for address in of_rows]
    return [write.multiply_add(weights[n // panels], minimums[n % panels], total) for n, total in enumerate(scaled)]


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
