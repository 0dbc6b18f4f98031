"""Products of small tiles of float32 that stay in registers.

A tile is `rows` rows of the left matrix times `panels` panels of the right one. A panel is 16 columns side by side,
so that one vector holds the same k of 16 columns. Every element of a result is summed over k in one order whatever
the tile, so a row's result does not depend on the rows beside it.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from services.engine.kernels.machine_code import intrinsic
from services.engine.kernels.writer import FLOAT, FLOATS, INT32, LANES, Writer, int64


def float_tile(rows: int, panels: int) -> Any:
    """An intrinsic: out = left (rows, k) times right (k, 16 * panels), all float32, plus out itself if `adds`.

    (left, left_row_stride, left_k_stride, right, right_panel_stride, right_k_stride, k, out, out_row_stride, adds),
    addresses and bytes; k is at least 1, a row's columns in `out` lie side by side.
    """

    @intrinsic
    def tile(
        typing_context: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any, i: Any, j: Any
    ) -> Any:
        def build(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
            left, left_row, left_k, right, right_panel, right_k, k, out, out_row, adds = arguments
            write = Writer(builder)
            targets = [
                write.address(write.address(out, row, out_row), panel, 4 * LANES)
                for row in range(rows)
                for panel in range(panels)
            ]
            zero = ir.Constant(FLOATS, None)
            wants = builder.icmp_signed("!=", adds, int64(0))
            with builder.if_then(builder.not_(wants)):
                for target in targets:
                    write.store(zero, target)
            initial = [write.load(target, FLOATS) for target in targets]

            def body(index: ir.Value, totals: list[ir.Value]) -> list[ir.Value]:
                at_right = builder.add(right, builder.mul(index, right_k))
                at_left = builder.add(left, builder.mul(index, left_k))
                columns = [write.load(write.address(at_right, p, right_panel), FLOATS) for p in range(panels)]
                factors = [write.load(write.address(at_left, row, left_row), FLOAT) for row in range(rows)]
                spread = [write.spread(factor, FLOATS) for factor in factors]
                return [
                    write.multiply_add(spread[n // panels], columns[n % panels], total)
                    for n, total in enumerate(totals)
                ]

            for target, total in zip(targets, write.loop(k, initial, body), strict=True):
                write.store(total, target)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 10), build

    return tile


def dot_tile(rows: int) -> Any:
    """An intrinsic: out (rows,) = left (rows, length) times one vector, all float32; rows is 1 or LANES.

    (left, left_row_stride, vector, length, out), addresses and bytes; length, in elements, is a multiple of LANES.
    """

    @intrinsic
    def tile(typing_context: Any, a: Any, b: Any, c: Any, d: Any, e: Any) -> Any:
        def build(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
            left, left_row, vector, length, out = arguments
            write = Writer(builder)

            def body(index: ir.Value, totals: list[ir.Value]) -> list[ir.Value]:
                offset = builder.mul(index, int64(4 * LANES))
                factor, at = write.load(builder.add(vector, offset), FLOATS), builder.add(left, offset)
                return [
                    write.multiply_add(write.load(write.address(at, row, left_row), FLOATS), factor, total)
                    for row, total in enumerate(totals)
                ]

            count = builder.sdiv(length, int64(LANES))
            totals = write.loop(count, [ir.Constant(FLOATS, None)] * rows, body)
            sums = write.sum_lanes(totals if rows > 1 else totals * LANES)
            if rows > 1:
                write.store(sums, out)
            else:
                single = builder.extract_element(sums, ir.Constant(INT32, 0))
                builder.store(single, builder.inttoptr(out, FLOAT.as_pointer()))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), build

    return tile
