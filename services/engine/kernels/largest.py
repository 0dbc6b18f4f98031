"""The largest of many float32 and its place: the first of equals; NaN is larger than any number, as torch has it."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from services.engine.kernels.machine_code import intrinsic, part_of_kernel
from services.engine.kernels.memory import floats
from services.engine.kernels.writer import FLOATS, INT32, INTS, LANES, Writer, int64


@intrinsic
def _largest_of_lanes(typing_context: Any, values: Any, count: Any, best: Any, places: Any) -> Any:
    """Of each lane of `count` vectors at `values` the largest, to `best`, and its vector's number, to `places`.

    Addresses of LANES float32 and int32; count is at least 1.
    """

    def build(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        values, count, best, places = arguments
        write = Writer(builder)

        def body(index: ir.Value, kept: list[ir.Value]) -> list[ir.Value]:
            largest, place = kept
            vector = write.load(builder.add(values, builder.mul(index, int64(4 * LANES))), FLOATS)
            is_larger = builder.fcmp_unordered(">", vector, largest)  # so is NaN, but not than another
            is_larger = builder.and_(is_larger, builder.fcmp_ordered("ord", largest, largest))
            here = write.spread(builder.trunc(index, INT32), INTS)
            return [builder.select(is_larger, vector, largest), builder.select(is_larger, here, place)]

        largest, place = write.loop(count, [write.load(values, FLOATS), ir.Constant(INTS, None)], body)
        write.store(largest, best)
        write.store(place, places)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), build


@part_of_kernel
def is_larger(value: Any, than: Any) -> bool:
    """Whether a number, or NaN, comes before one that was found earlier."""
    return value > than or (np.isnan(value) and not np.isnan(than))


@part_of_kernel
def find_largest(address: int, count: int) -> Any:
    """The largest of `count` float32, at least one, and its place."""
    values, whole = floats(address, (count,)), count // LANES
    largest, place = values[0], 0
    if whole > 0:
        best, places = np.empty(LANES, dtype=np.float32), np.empty(LANES, dtype=np.int32)
        _largest_of_lanes(address, whole, best.ctypes.data, places.ctypes.data)
        for lane in range(LANES):
            here = int(places[lane]) * LANES + lane
            if is_larger(best[lane], largest) or (not is_larger(largest, best[lane]) and here < place):
                largest, place = best[lane], here
    for index in range(whole * LANES, count):
        if is_larger(values[index], largest):
            largest, place = values[index], index
    return largest, place
