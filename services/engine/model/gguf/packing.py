"""Blocks of GGUF's quantised tensors as the linear layers take them (ggml-common.h of github.com/ggml-org/ggml)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.engine.model.gguf.reader import GgufTensor

_HALF_BYTES = 2


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """A matrix in the form of linear.blocks.Blocks: the very numbers of the file, but for what _q4_k says."""

    numbers: NDArray[np.uint8] | NDArray[np.int8]  # (rows, blocks, 16) of nibbles or (rows, blocks, 32) of bytes
    scales: NDArray[np.float16]  # (rows, blocks)
    minimums: NDArray[np.float16] | None  # (rows, blocks), of nibbles

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """What it consists of, by name."""
        parts: dict[str, NDArray[np.generic]] = {"numbers": self.numbers, "scales": self.scales}
        return parts if self.minimums is None else {**parts, "minimums": self.minimums}


def is_packable(tensor: GgufTensor) -> bool:
    """Whether packed() can take a tensor as it stands in the file."""
    return len(tensor.shape) == 2 and tensor.quantization in _PACK


def packed(tensor: GgufTensor) -> PackedTensor:
    """The blocks of a tensor that is packable."""
    block_bytes, pack = _PACK[tensor.quantization]
    data = np.ascontiguousarray(tensor.data).view(np.uint8)
    return pack(data.reshape(tensor.shape[0], -1, block_bytes))


def _q4_0(data: NDArray[np.uint8]) -> PackedTensor:
    """A scale and nibbles less 8."""
    scales = _halves(data, 0)
    return PackedTensor(data[..., _HALF_BYTES:], scales, scales * np.float16(-8))


def _q4_1(data: NDArray[np.uint8]) -> PackedTensor:
    """A scale, a minimum and nibbles."""
    return PackedTensor(data[..., 2 * _HALF_BYTES :], _halves(data, 0), _halves(data, 1))


def _q4_k(data: NDArray[np.uint8]) -> PackedTensor:
    """A scale and a minimum of eight blocks, by what six bits of each block multiply them, and nibbles.

    Products of a float16 and six bits are rounded to float16: a weight changes by at most 1/2048 of its own scale times
    its number, and of its minimum.
    """
    (num_rows, num_super, _), factors = data.shape, data[..., 4:16]
    first, second, third = factors[..., :4], factors[..., 4:8], factors[..., 8:]
    scales = np.concatenate((first & 63, (third & 15) | (first >> 6 << 4)), axis=-1)
    minimums = np.concatenate((second & 63, (third >> 4) | (second >> 6 << 4)), axis=-1)
    pairs = data[..., 16:].reshape(num_rows, num_super, 4, 1, 32)  # the low halves are a block, the high ones the next
    numbers = np.concatenate((pairs & 15, pairs >> 4), axis=-2).reshape(num_rows, num_super * 8, 2, 16)
    return PackedTensor(
        numbers[..., 0, :] | numbers[..., 1, :] << 4,
        (_halves(data, 0).astype(np.float32)[..., None] * scales).astype(np.float16).reshape(num_rows, -1),
        (_halves(data, 1).astype(np.float32)[..., None] * -minimums.astype(np.float32))
        .astype(np.float16)
        .reshape(num_rows, -1),
    )


def _q5_0(data: NDArray[np.uint8]) -> PackedTensor:
    """A scale, the fifth bits and nibbles, less 16."""
    fifth = np.unpackbits(data[..., 2:6], axis=-1, bitorder="little")
    nibbles = data[..., 6:]
    numbers = np.concatenate((nibbles & 15, nibbles >> 4), axis=-1) | fifth << 4
    return PackedTensor(numbers.view(np.int8) - np.int8(16), _halves(data, 0), None)


def _q8_0(data: NDArray[np.uint8]) -> PackedTensor:
    """A scale and bytes."""
    return PackedTensor(data[..., _HALF_BYTES:].view(np.int8), _halves(data, 0), None)


# Bytes of what is stored together, and what makes blocks of it.
_PACK: dict[str, tuple[int, Callable[[NDArray[np.uint8]], PackedTensor]]] = {
    "Q4_0": (18, _q4_0),
    "Q4_1": (20, _q4_1),
    "Q4_K": (144, _q4_k),
    "Q5_0": (22, _q5_0),
    "Q8_0": (34, _q8_0),
}


def _halves(data: NDArray[np.uint8], index: int) -> NDArray[np.float16]:
    start = index * _HALF_BYTES
    return np.ascontiguousarray(data[..., start : start + _HALF_BYTES]).view(np.float16)[..., 0]
