"""What the tiles of products are written with: vectors of LANES numbers in LLVM's own language.

Out of numba's loops LLVM does not make the instructions that matter, vpdpbusd above all, which multiplies and adds 64
pairs of bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import config

LANES = 16  # columns of a panel
INT8, INT32, INT64, FLOAT = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
INTS, FLOATS = ir.VectorType(INT32, LANES), ir.VectorType(FLOAT, LANES)
# What kernels are compiled for: this processor, unless NUMBA_CPU_FEATURES (+one,-another) says otherwise.
_NAMED: str | None = vars(config)["CPU_FEATURES"]
FEATURES: Mapping[str, bool] = (
    llvm.get_host_cpu_features()
    if _NAMED is None
    else {name.strip()[1:]: name.strip()[0] == "+" for name in _NAMED.split(",") if name.strip()}
)
HAS_WIDE_VECTORS = bool(FEATURES.get("avx512f"))
# Without the instruction LLVM would call a function that numba does not have.
_CONVERTS_HALVES = HAS_WIDE_VECTORS or bool(FEATURES.get("f16c"))


class Writer:
    """Writes what tiles have in common."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.builder = builder

    def address(self, base: ir.Value, count: int, stride: ir.Value | int) -> ir.Value:
        """base + count * stride bytes."""
        step = int64(stride) if isinstance(stride, int) else stride
        return self.builder.add(base, self.builder.mul(step, int64(count)))

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
        single = self.builder.insert_element(empty, value, ir.Constant(INT32, 0))
        return self.builder.shuffle_vector(single, empty, ir.Constant(ir.VectorType(INT32, LANES), [0] * LANES))

    def call(self, name: str, vector: ir.VectorType, *arguments: ir.Value) -> ir.Value:
        """Calls an operation of LLVM on vectors of one type."""
        kind = ir.FunctionType(vector, [vector] * len(arguments))
        module = self.builder.module
        function = module.globals.get(name) or ir.Function(module, kind, name)
        return self.builder.call(function, arguments)

    def reduce(self, operation: str, vector: ir.Value, kind: ir.Type) -> ir.Value:
        """One value of all lanes of a vector."""
        name = f"llvm.vector.reduce.{operation}.v{LANES}{'f32' if kind == FLOAT else 'i32'}"
        module = self.builder.module
        function = module.globals.get(name) or ir.Function(module, ir.FunctionType(kind, [vector.type]), name)
        return self.builder.call(function, [vector])

    def multiply_add(self, left: ir.Value, right: ir.Value, total: ir.Value) -> ir.Value:
        """left * right + total in float32, rounded once."""
        return self.call(f"llvm.fma.v{LANES}f32", FLOATS, left, right, total)

    def add_byte_products(self, total: ir.Value, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
        """total (16,) int32 plus the products of 4 unsigned and 4 signed bytes in each of 16 lanes."""
        if FEATURES.get("avx512vnni"):
            return self.call("llvm.x86.avx512.vpdpbusd.512", INTS, total, unsigned, signed)
        if FEATURES.get("avxvnni"):
            halves = [
                self.call(
                    "llvm.x86.avx512.vpdpbusd.256",
                    ir.VectorType(INT32, 8),
                    *(self._half(value, half) for value in (total, unsigned, signed)),
                )
                for half in (0, 1)
            ]
            return self._select(halves[0], halves[1], range(LANES))
        builder, wide = self.builder, ir.VectorType(INT32, 4 * LANES)
        every_byte = ir.VectorType(INT8, 4 * LANES)
        product = builder.mul(
            builder.zext(builder.bitcast(unsigned, every_byte), wide),
            builder.sext(builder.bitcast(signed, every_byte), wide),
        )
        for part in range(4):
            total = builder.add(total, self._select(product, product, range(part, 4 * LANES, 4)))
        return total

    def nibbles(self, vectors: Sequence[ir.Value]) -> tuple[list[ir.Value], list[ir.Value]]:
        """The low halves of the bytes of some vectors (16,) int32, and the high halves."""
        builder, mask = self.builder, ir.Constant(INTS, [0x0F0F0F0F] * LANES)
        four = ir.Constant(INTS, [4] * LANES)
        low = [builder.and_(vector, mask) for vector in vectors]
        return low, [builder.and_(builder.lshr(vector, four), mask) for vector in vectors]

    def halves(self, address: ir.Value) -> ir.Value:
        """The 16 float16 at an address as float32."""
        builder = self.builder
        if _CONVERTS_HALVES:
            return builder.fpext(self.load(address, ir.VectorType(ir.HalfType(), LANES)), FLOATS)

        def every(value: float, kind: ir.Type = INTS) -> ir.Constant:
            return ir.Constant(kind, [value] * LANES)

        # The exponent of a float32 counts from 127, that of a float16 from 15.
        bits = builder.zext(self.load(address, ir.VectorType(ir.IntType(16), LANES)), INTS)
        magnitude = builder.shl(builder.and_(bits, every(0x7FFF)), every(13))
        scaled = builder.fmul(builder.bitcast(magnitude, FLOATS), every(2.0 ** (127 - 15), FLOATS))
        sign = builder.shl(builder.and_(bits, every(0x8000)), every(16))
        return builder.bitcast(builder.or_(builder.bitcast(scaled, INTS), sign), FLOATS)

    def prefetch(self, address: ir.Value) -> None:
        """Has the cache line at an address brought near; it need not be memory of ours."""
        line, module = INT8.as_pointer(), self.builder.module
        kind, name = ir.FunctionType(ir.VoidType(), [line, INT32, INT32, INT32]), "llvm.prefetch.p0"
        function = module.globals.get(name) or ir.Function(module, kind, name)
        reads, keeps, data = (ir.Constant(INT32, value) for value in (0, 2, 1))
        self.builder.call(function, [self.builder.inttoptr(address, line), reads, keeps, data])

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
        mask = ir.Constant(ir.VectorType(INT32, len(lanes)), list(lanes))
        return self.builder.shuffle_vector(first, second, mask)

    def loop(self, count: ir.Value, initial: list[ir.Value], body: Any) -> list[ir.Value]:
        """body(i, values) -> values for i < count, count >= 1; the last values."""
        builder, before = self.builder, self.builder.block
        head, after = builder.append_basic_block("loop"), builder.append_basic_block("after")
        builder.branch(head)
        builder.position_at_end(head)
        index = builder.phi(INT64)
        index.add_incoming(int64(0), before)
        values = [builder.phi(value.type) for value in initial]
        for phi, value in zip(values, initial, strict=True):
            phi.add_incoming(value, before)
        updated = body(index, values)
        following = builder.add(index, int64(1))
        for phi, value in zip(values, updated, strict=True):
            phi.add_incoming(value, builder.block)
        index.add_incoming(following, builder.block)
        builder.cbranch(builder.icmp_signed("<", following, count), head, after)
        builder.position_at_end(after)
        return list(updated)


def int64(value: int) -> ir.Constant:
    """A number of LLVM's."""
    return ir.Constant(INT64, value)
