"""Products of small tiles of whole numbers in blocks, with a scale for each block.

Rows are rounded to whole numbers of one or two bytes, GROUP of them with a scale of their own. Those of two bytes are
256 * high + low, both signed bytes, of a group first all that are high: each multiplies the same weights, loaded once.
Weights are blocks of GROUP of k: bytes or nibbles, a scale and for nibbles a minimum for each column, so that a weight
is scale * number + minimum. A block of a panel, 16 columns side by side, is one piece of memory, and the blocks of a
tile follow each other as they are used: for each block of k, its panels.

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
SCALE_BYTES = 12  # of each group of a row: its scale, -128 times the sum of its numbers (int32), scale times that sum
_HALVES = 2 * LANES  # bytes of 16 scales
_AHEAD = 2048  # bytes between what is computed with and what is fetched from memory
_LINE = 64
_BITS_OF_LOW = 8
_LARGEST_NUMBER = {1: 127, 2: (127 << _BITS_OF_LOW) + 127}  # by the bytes of a number; neither of two overflows
# The largest magnitude of a group that is not zero: those of far less have no factor in float32.
_SMALLEST_SCALED = 2.0**-100


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


def byte_tile(rows: int, panels: int, number_bytes: int) -> Any:
    """An intrinsic: out (rows, 16 * panels) = rounded rows times a tile of bytes; see _tile."""
    return _tile(rows, panels, _BYTES, number_bytes)


def nibble_tile(rows: int, panels: int, number_bytes: int) -> Any:
    """An intrinsic: out (rows, 16 * panels) = rounded rows times a tile of nibbles; see _tile."""
    return _tile(rows, panels, _NIBBLES, number_bytes)


def _tile(rows: int, panels: int, form: _Form, number_bytes: int) -> Any:
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
                    for base, step in (
                        (left, number_bytes * GROUP),
                        (scales, SCALE_BYTES),
                        (right, panels * form.block_bytes),
                    )
                ]
                numbers = [write.address(at[0], row, left_row) for row in range(rows)]
                of_rows = [write.address(at[1], row, scales_row) for row in range(rows)]
                blocks = [write.address(at[2], panel, form.block_bytes) for panel in range(panels)]
                for line in range(0, panels * form.block_bytes, _LINE):
                    write.prefetch(builder.add(at[2], int64(line + _AHEAD)))
                sums = _sums(write, form, number_bytes, numbers, of_rows, blocks)
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
    write: Writer,
    form: _Form,
    number_bytes: int,
    numbers: Sequence[ir.Value],
    of_rows: Sequence[ir.Value],
    blocks: Sequence[ir.Value],
) -> list[ir.Value]:
    """Sums of the products of numbers within a group, row by row and panel by panel, int32 and exact."""
    builder, zero = write.builder, ir.Constant(INTS, None)
    starts = [zero] * len(numbers)
    if not form.has_minimums:  # bytes are stored plus 128
        starts = [write.spread(write.load(builder.add(each, int64(4)), INT32), INTS) for each in of_rows]
    low = [start for start in starts for _ in blocks]
    sums = [[zero] * len(low), low][-number_bytes:]  # of each byte of the rows' numbers, the highest first
    for k, columns in _columns(write, form, blocks):
        for row, address in enumerate(numbers):
            for part, of_part in enumerate(sums):
                signed = write.spread(write.load(builder.add(address, int64(part * GROUP + k)), INT32), INTS)
                for n, column in enumerate(columns, row * len(blocks)):
                    of_part[n] = write.add_byte_products(of_part[n], column, signed)
    if number_bytes == 1:
        return low
    bits = ir.Constant(INTS, [_BITS_OF_LOW] * LANES)
    return [builder.add(builder.shl(high, bits), rest) for high, rest in zip(*sums, strict=True)]


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


def quantise_group(number_bytes: int) -> Any:
    """An intrinsic: (values, quantised, scale), addresses: GROUP float32 to as many numbers, and SCALE_BYTES.

    The largest magnitude becomes the largest number; the others are rounded to the nearest, halves to even.
    """

    @intrinsic
    def quantise(typing_context: Any, values: Any, quantised: Any, scale: Any) -> Any:
        def build(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
            values, quantised, scale = arguments
            write = Writer(builder)
            vectors = [write.load(builder.add(values, int64(4 * lane)), FLOATS) for lane in range(0, GROUP, LANES)]
            first, second = (write.call(f"llvm.fabs.v{LANES}f32", FLOATS, vector) for vector in vectors)
            magnitudes = write.call(f"llvm.maxnum.v{LANES}f32", FLOATS, first, second)
            largest = write.reduce("fmax", magnitudes, FLOAT)
            limit, zero = ir.Constant(FLOAT, float(_LARGEST_NUMBER[number_bytes])), ir.Constant(FLOAT, 0.0)
            is_zero = builder.fcmp_ordered("<", largest, ir.Constant(FLOAT, _SMALLEST_SCALED))
            factor = write.spread(builder.select(is_zero, zero, builder.fdiv(limit, largest)), FLOATS)
            total = ir.Constant(INTS, None)
            for number, vector in enumerate(vectors):
                rounded = write.call(f"llvm.rint.v{LANES}f32", FLOATS, builder.fmul(vector, factor))
                whole = builder.fptosi(rounded, INTS)
                total = builder.add(total, whole)
                _store_bytes(write, whole, builder.add(quantised, int64(LANES * number)), number_bytes)
            count, step = write.reduce("add", total, INT32), builder.fdiv(largest, limit)
            write.store(step, scale)
            write.store(builder.mul(count, ir.Constant(INT32, -128)), builder.add(scale, int64(4)))
            write.store(builder.fmul(step, builder.sitofp(count, FLOAT)), builder.add(scale, int64(8)))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), build

    return quantise


def _store_bytes(write: Writer, whole: ir.Value, address: ir.Value, number_bytes: int) -> None:
    """The bytes of some numbers of a group, the highest first."""
    builder, narrow = write.builder, ir.VectorType(INT8, LANES)
    if number_bytes == 2:
        half = ir.Constant(INTS, [1 << (_BITS_OF_LOW - 1)] * LANES)  # low is signed, too
        high = builder.ashr(builder.add(whole, half), ir.Constant(INTS, [_BITS_OF_LOW] * LANES))
        write.store(builder.trunc(high, narrow), address)
        address = builder.add(address, int64(GROUP))
    write.store(builder.trunc(whole, narrow), address)
