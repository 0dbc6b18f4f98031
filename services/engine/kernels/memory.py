"""Memory by its address, and what threads share, for kernels."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from services.engine.kernels.machine_code import array_at, compiled, intrinsic, pointer_to
from services.engine.kernels.writer import Writer

_INT64 = ir.IntType(64)


def _pointer_intrinsic(element: types.Type) -> Any:
    @intrinsic
    def to_pointer(typing_context: Any, address: Any) -> Any:
        def build(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(element).as_pointer())

        return pointer_to(element)(types.int64), build

    return to_pointer


_to_floats = _pointer_intrinsic(types.float32)
_to_int32s = _pointer_intrinsic(types.int32)
_to_int64s = _pointer_intrinsic(types.int64)


@compiled
def floats(address: int, shape: Any) -> Any:
    """The float32 array at an address."""
    return array_at(_to_floats(address), shape)


@compiled
def int32s(address: int, shape: Any) -> Any:
    """The int32 array at an address."""
    return array_at(_to_int32s(address), shape)


@compiled
def int64s(address: int, shape: Any) -> Any:
    """The int64 array at an address."""
    return array_at(_to_int64s(address), shape)


@intrinsic
def as_float(typing_context: Any, bits: Any) -> Any:
    """The float32 whose bits an int32 has."""

    def build(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), build


@intrinsic
def atomic_load(typing_context: Any, address: Any) -> Any:
    """The int64 at an address, and what other threads wrote before they put it there."""

    def build(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(_int64_pointer(builder, arguments[0]), "acquire", 8)

    return types.int64(types.int64), build


@intrinsic
def atomic_store(typing_context: Any, address: Any, value: Any) -> Any:
    """Puts an int64 at an address; who sees it there sees everything written before."""

    def build(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        builder.store_atomic(arguments[1], _int64_pointer(builder, arguments[0]), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), build


@intrinsic
def atomic_add(typing_context: Any, address: Any, value: Any) -> Any:
    """Adds to the int64 at an address; what was there."""

    def build(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", _int64_pointer(builder, arguments[0]), arguments[1], "acq_rel")

    return types.int64(types.int64, types.int64), build


@intrinsic
def atomic_swap_if(typing_context: Any, address: Any, expected: Any, value: Any) -> Any:
    """Puts `value` where `expected` is; whether it was."""

    def build(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        pointer = _int64_pointer(builder, arguments[0])
        pair = builder.cmpxchg(pointer, arguments[1], arguments[2], "acq_rel", "acquire")
        return builder.extract_value(pair, 1)

    return types.boolean(types.int64, types.int64, types.int64), build


@intrinsic
def call_kernel(typing_context: Any, address: Any, job: Any, chunk: Any) -> Any:
    """Calls the kernel at an address, see machine_code.kernel, for one chunk of the job at another."""

    def build(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        function = ir.FunctionType(ir.VoidType(), [_INT64.as_pointer(), _INT64])
        pointer = builder.inttoptr(arguments[0], function.as_pointer())
        builder.call(pointer, [_int64_pointer(builder, arguments[1]), arguments[2]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), build


@intrinsic
def prefetch(typing_context: Any, address: Any) -> Any:
    """Has the cache line at an address brought near; it need not be memory of ours."""

    def build(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        Writer(builder).prefetch(arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64), build


def _int64_pointer(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return builder.inttoptr(address, _INT64.as_pointer())
