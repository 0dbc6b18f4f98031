"""Weights of attention out of scores, a lane a query, in vectors that stay in registers."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from services.engine.kernels.functions import POLYNOMIAL_OF_2
from services.engine.kernels.machine_code import intrinsic
from services.engine.kernels.writer import FLOATS, INTS, LANES, Writer

_WIDTH = 4 * LANES  # bytes of a vector
# Where there are none, numba puts its own, by which there is no NaN. A score that is NaN, such as that of a key which
# was never written, must show.
_FLAGS = ("nsz",)


def weigh_tile(panels: int) -> Any:
    """An intrinsic: scores (count, 16 * panels), in units of log2(e), become weights relative to the best of each lane.

    A score that is NaN is never the best, and weighs NaN.

    (scores, row_stride, count, best, totals, shrink), addresses and bytes; count is at least 1, the last three have
    16 * panels float32. `best` and `totals`, the sums of weights, are brought up to date; what was summed with the best
    before is to be multiplied by `shrink`.
    """

    @intrinsic
    def weigh(typing_context: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any) -> Any:
        def build(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
            scores, row, count, best, totals, shrink = arguments
            write = Writer(builder)

            def loaded(address: ir.Value) -> list[ir.Value]:
                return [write.load(write.address(address, panel, _WIDTH), FLOATS) for panel in range(panels)]

            def stored(values: list[ir.Value], address: ir.Value) -> None:
                for panel, value in enumerate(values):
                    write.store(value, write.address(address, panel, _WIDTH))

            def compare(index: ir.Value, largest: list[ir.Value]) -> list[ir.Value]:
                found = loaded(builder.add(scores, builder.mul(index, row)))
                return [_larger(builder, one, other) for one, other in zip(found, largest, strict=True)]

            def weigh(index: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
                at = builder.add(scores, builder.mul(index, row))
                weights = [
                    _power_of_2(write, builder.fsub(one, most, flags=_FLAGS))
                    for one, most in zip(loaded(at), largest, strict=True)
                ]
                stored(weights, at)
                return [builder.fadd(total, weight) for total, weight in zip(sums, weights, strict=True)]

            before = loaded(best)
            largest = write.loop(count, before, compare)
            factors = [_power_of_2(write, builder.fsub(old, new)) for old, new in zip(before, largest, strict=True)]
            sums = [builder.fmul(total, factor) for total, factor in zip(loaded(totals), factors, strict=True)]
            stored(write.loop(count, sums, weigh), totals)
            stored(largest, best)
            stored(factors, shrink)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), build

    return weigh


def _larger(builder: ir.IRBuilder, one: ir.Value, other: ir.Value) -> ir.Value:
    """The larger one of each lane; `other` where one of them is NaN."""
    return builder.select(builder.fcmp_ordered(">", one, other, flags=_FLAGS), one, other)


def _power_of_2(write: Writer, exponents: ir.Value) -> ir.Value:
    """As functions.power_of_2, of exponents of at most 0; NaN of NaN."""
    builder = write.builder

    def every(value: float, kind: ir.VectorType = FLOATS) -> ir.Constant:
        return ir.Constant(kind, [value] * LANES)

    lowest = every(-126.0)
    bounded = _larger(builder, exponents, lowest)  # and a number in each lane, as fptosi wants
    biased = builder.fptosi(builder.fadd(bounded, every(126.5)), INTS)  # the nearest whole number, plus 126
    power = builder.select(builder.fcmp_ordered("<", exponents, lowest, flags=_FLAGS), lowest, exponents)
    part = builder.fsub(power, builder.sitofp(builder.sub(biased, every(126, INTS)), FLOATS), flags=_FLAGS)
    value = every(POLYNOMIAL_OF_2[0])
    for coefficient in (*POLYNOMIAL_OF_2[1:], 1.0):
        value = write.multiply_add(value, part, every(coefficient))
    bits = builder.shl(builder.add(biased, every(1, INTS)), every(23, INTS))
    return builder.fmul(value, builder.bitcast(bits, FLOATS))
