"""Products of small tiles that stay in registers, written in LLVM's own language.

Out of numba's loops LLVM does not make the instructions that matter, vpdpbusd above all, which multiplies and adds 64
pairs of bytes.

A tile is `rows` rows of the left matrix times `panels` panels of the right one. A panel is 16 columns side by side,
so that one vector holds the same k of 16 columns. Every element of a result is summed over k in one order whatever
the tile, so a row's result does not depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types

from services.engine.kernels.machine_code import intrinsic

LANES = 16  # columns of a panel
GROUP = 64  # bytes of k that share a scale
_INT8, _INT32, _INT64, _FLOAT = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
_INTS, _FLOATS = ir.VectorType(_INT32, LANES), ir.VectorType(_FLOAT, LANES)
_FEATURES = llvm.get_host_cpu_features()
HAS_WIDE_VECTORS = bool(_FEATURES.get("avx512f"))


class _Writer:
    """Writes what tiles have in common."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.builder = builder

    def address(self, base: ir.Value, count: int, stride: ir.Value | int) -> ir.Value:
        """base + count * stride bytes."""
        step = _int64(stride) if isinstance(stride, int) else stride
        return self.builder.add(base, self.builder.mul(step, _int64(count)))

    def load(self, address: ir.Value, kind: ir.Type) -> ir.Value:
        """What is at an address; it need not be aligned."""
        value = self.builder.load(self.builder.inttoptr(address, kind.as_pointer()))
        value.align = 1
        return value

    def store(self, value: ir.Value, address: ir.Value) -> None:
        """Puts a value at an address; it need not be aligned."""
        self.builder.store(value, self.builder.inttoptr(address, value.type.as_pointer())).align = 1

    def spread(self, value: ir.Value, vector: ir.VectorType) -> ir.Value:
        """A vector of one value."""
        empty = ir.Constant(vector, ir.Undefined)
        single = self.builder.insert_element(empty, value, ir.Constant(_INT32, 0))
        return self.builder.shuffle_vector(single, empty, ir.Constant(ir.VectorType(_INT32, LANES), [0] * LANES))

    def call(self, name: str, vector: ir.VectorType, *arguments: ir.Value) -> ir.Value:
        """Calls an operation of LLVM on vectors of one type."""
        kind = ir.FunctionType(vector, [vector] * len(arguments))
        module = self.builder.module
        function = module.globals.get(name) or ir.Function(module, kind, name)
        return self.builder.call(function, arguments)

    def reduce(self, operation: str, vector: ir.Value, kind: ir.Type) -> ir.Value:
        """One value of all lanes of a vector."""
        name = f"llvm.vector.reduce.{operation}.v{LANES}{'f32' if kind == _FLOAT else 'i32'}"
        module = self.builder.module
        function = module.globals.get(name) or ir.Function(module, ir.FunctionType(kind, [vector.type]), name)
        return self.builder.call(function, [vector])

    def multiply_add(self, left: ir.Value, right: ir.Value, total: ir.Value) -> ir.Value:
        """left * right + total in float32, rounded once."""
        return self.call(f"llvm.fma.v{LANES}f32", _FLOATS, left, right, total)

    def add_byte_products(self, total: ir.Value, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
        """total (16,) int32 plus the products of 4 unsigned and 4 signed bytes in each of 16 lanes."""
        if _FEATURES.get("avx512vnni"):
            return self.call("llvm.x86.avx512.vpdpbusd.512", _INTS, total, unsigned, signed)
        if _FEATURES.get("avxvnni"):
            halves = [
                self.call(
                    "llvm.x86.avx512.vpdpbusd.256",
                    ir.VectorType(_INT32, 8),
                    *(self._half(value, half) for value in (total, unsigned, signed)),
                )
                for half in (0, 1)
            ]
            return self._select(halves[0], halves[1], range(LANES))
        builder, wide = self.builder, ir.VectorType(_INT32, 4 * LANES)
        every_byte = ir.VectorType(_INT8, 4 * LANES)
        product = builder.mul(
            builder.zext(builder.bitcast(unsigned, every_byte), wide),
            builder.sext(builder.bitcast(signed, every_byte), wide),
        )
        for part in range(4):
            total = builder.add(total, self._select(product, product, range(part, 4 * LANES, 4)))
        return total

    def sum_lanes(self, vectors: list[ir.Value]) -> ir.Value:
        """Of LANES vectors, a vector of the sums of each: halves are added pair by pair until one is left."""
        width = LANES
        while len(vectors) > 1:
            width //= 2
            starts = range(0, 2 * LANES, 2 * width)
            low = [start + lane for start in starts for lane in range(width)]
            vectors = [
                self.builder.fadd(
                    self._select(first, second, low), self._select(first, second, [lane + width for lane in low])
                )
                for first, second in zip(vectors[::2], vectors[1::2], strict=True)
            ]
        return vectors[0]

    def _half(self, value: ir.Value, half: int) -> ir.Value:
        return self._select(value, value, range(8 * half, 8 * half + 8))

    def _select(self, first: ir.Value, second: ir.Value, lanes: Sequence[int]) -> ir.Value:
        mask = ir.Constant(ir.VectorType(_INT32, len(lanes)), list(lanes))
        return self.builder.shuffle_vector(first, second, mask)

    def loop(self, count: ir.Value, initial: list[ir.Value], body: Any) -> list[ir.Value]:
        """body(i, values) -> values for i < count, count >= 1; the last values."""
        builder, before = self.builder, self.builder.block
        head, after = builder.append_basic_block("loop"), builder.append_basic_block("after")
        builder.branch(head)
        builder.position_at_end(head)
        index = builder.phi(_INT64)
        index.add_incoming(_int64(0), before)
        values = [builder.phi(value.type) for value in initial]
        for phi, value in zip(values, initial, strict=True):
            phi.add_incoming(value, before)
        updated = body(index, values)
        following = builder.add(index, _int64(1))
        for phi, value in zip(values, updated, strict=True):
            phi.add_incoming(value, builder.block)
        index.add_incoming(following, builder.block)
        builder.cbranch(builder.icmp_signed("<", following, count), head, after)
        builder.position_at_end(after)
        return list(updated)


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
            write = _Writer(builder)
            targets = [
                write.address(write.address(out, row, out_row), panel, 4 * LANES)
                for row in range(rows)
                for panel in range(panels)
            ]
            zero = ir.Constant(_FLOATS, None)
            wants = builder.icmp_signed("!=", adds, _int64(0))
            with builder.if_then(builder.not_(wants)):
                for target in targets:
                    write.store(zero, target)
            initial = [write.load(target, _FLOATS) for target in targets]

            def body(index: ir.Value, totals: list[ir.Value]) -> list[ir.Value]:
                at_right = builder.add(right, builder.mul(index, right_k))
                at_left = builder.add(left, builder.mul(index, left_k))
                columns = [write.load(write.address(at_right, p, right_panel), _FLOATS) for p in range(panels)]
                factors = [write.load(write.address(at_left, row, left_row), _FLOAT) for row in range(rows)]
                spread = [write.spread(factor, _FLOATS) for factor in factors]
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
            write = _Writer(builder)

            def body(index: ir.Value, totals: list[ir.Value]) -> list[ir.Value]:
                offset = builder.mul(index, _int64(4 * LANES))
                factor, at = write.load(builder.add(vector, offset), _FLOATS), builder.add(left, offset)
                return [
                    write.multiply_add(write.load(write.address(at, row, left_row), _FLOATS), factor, total)
                    for row, total in enumerate(totals)
                ]

            count = builder.sdiv(length, _int64(LANES))
            totals = write.loop(count, [ir.Constant(_FLOATS, None)] * rows, body)
            sums = write.sum_lanes(totals if rows > 1 else totals * LANES)
            if rows > 1:
                write.store(sums, out)
            else:
                single = builder.extract_element(sums, ir.Constant(_INT32, 0))
                builder.store(single, builder.inttoptr(out, _FLOAT.as_pointer()))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), build

    return tile


def byte_tile(rows: int, panels: int) -> Any:
    """An intrinsic: out = left (rows, k) times right (k, 16 * panels), both of bytes with a scale for each GROUP of k.

    (left, left_row_stride, scales, scales_row_stride, right, right_panel_stride, right_scales,
    right_scales_panel_stride, num_groups, out, out_row_stride), addresses and bytes. left is signed; of each row and
    group `scales` has a float32 and then, as int32, -128 times the sum of its bytes. right holds bytes plus 128: of a
    panel, for each four of k, 16 columns of four bytes; right_scales of a panel, for each group, 16 float32.
    """

    @intrinsic
    def tile(
        typing_context: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any, i: Any, j: Any, k: Any
    ) -> Any:
        def build(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
            left, left_row, scales, scales_row, right, right_panel, right_scales, scales_panel = arguments[:8]
            num_groups, out, out_row = arguments[8:]
            write = _Writer(builder)

            def group(index: ir.Value, totals: list[ir.Value]) -> list[ir.Value]:
                at_left = builder.add(left, builder.mul(index, _int64(GROUP)))
                at_right = builder.add(right, builder.mul(index, _int64(GROUP * LANES)))
                at_scales = builder.add(scales, builder.mul(index, _int64(8)))
                at_right_scales = builder.add(right_scales, builder.mul(index, _int64(4 * LANES)))
                rows_at = [write.address(at_scales, row, scales_row) for row in range(rows)]
                offsets = [write.load(builder.add(address, _int64(4)), _INT32) for address in rows_at]
                sums = [write.spread(offset, _INTS) for offset in offsets for _ in range(panels)]
                for four in range(0, GROUP, 4):
                    columns = [
                        write.load(write.address(builder.add(at_right, _int64(LANES * four)), p, right_panel), _INTS)
                        for p in range(panels)
                    ]
                    for row in range(rows):
                        address = builder.add(write.address(at_left, row, left_row), _int64(four))
                        signed = write.spread(write.load(address, _INT32), _INTS)
                        for p in range(panels):
                            n = row * panels + p
                            sums[n] = write.add_byte_products(sums[n], columns[p], signed)
                of_columns = [
                    write.load(write.address(at_right_scales, p, scales_panel), _FLOATS) for p in range(panels)
                ]
                of_rows = [write.spread(write.load(address, _FLOAT), _FLOATS) for address in rows_at]
                return [
                    write.multiply_add(
                        builder.sitofp(sums[n], _FLOATS),
                        builder.fmul(of_rows[n // panels], of_columns[n % panels]),
                        total,
                    )
                    for n, total in enumerate(totals)
                ]

            totals = write.loop(num_groups, [ir.Constant(_FLOATS, None)] * (rows * panels), group)
            for n, total in enumerate(totals):
                write.store(total, write.address(write.address(out, n // panels, out_row), n % panels, 4 * LANES))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 11), build

    return tile


@intrinsic
def quantise_group(typing_context: Any, values: Any, quantised: Any, scale: Any) -> Any:
    """GROUP float32 at `values` to signed bytes at `quantised`, by address; at `scale` as byte_tile wants it.

    The largest magnitude becomes 127; the others are rounded to the nearest, halves to even.
    """

    def build(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        values, quantised, scale = arguments
        write = _Writer(builder)
        vectors = [write.load(builder.add(values, _int64(4 * lane)), _FLOATS) for lane in range(0, GROUP, LANES)]
        magnitudes = [write.call(f"llvm.fabs.v{LANES}f32", _FLOATS, vector) for vector in vectors]
        for half in (2, 1):
            magnitudes = [
                write.call(f"llvm.maxnum.v{LANES}f32", _FLOATS, magnitudes[n], magnitudes[n + half])
                for n in range(half)
            ]
        largest = write.reduce("fmax", magnitudes[0], _FLOAT)
        limit, zero = ir.Constant(_FLOAT, 127.0), ir.Constant(_FLOAT, 0.0)
        is_zero = builder.fcmp_ordered("==", largest, zero)
        factor = write.spread(builder.select(is_zero, zero, builder.fdiv(limit, largest)), _FLOATS)
        total = ir.Constant(_INTS, None)
        for number, vector in enumerate(vectors):
            rounded = write.call(f"llvm.rint.v{LANES}f32", _FLOATS, builder.fmul(vector, factor))
            whole = builder.fptosi(rounded, _INTS)
            total = builder.add(total, whole)
            narrow = builder.trunc(whole, ir.VectorType(_INT8, LANES))
            write.store(narrow, builder.add(quantised, _int64(LANES * number)))
        offset = builder.mul(write.reduce("add", total, _INT32), ir.Constant(_INT32, -128))
        write.store(builder.fdiv(largest, limit), scale)
        write.store(offset, builder.add(scale, _int64(4)))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), build


def _int64(value: int) -> ir.Constant:
    return ir.Constant(_INT64, value)
