"""Blocks of GGUF's quantised tensors as the linear layers take them (ggml-common.h of github.com/ggml-org/ggml)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.engine.model.gguf.reader import GgufTensor
from services.engine.model.linear.blocks import BLOCK

_HALF_BYTES = 2


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """A matrix in the form of linear.blocks.Blocks: the very numbers of the file, nothing is rounded."""

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
    data = np.ascontiguousarray(tensor.data).view(np.uint8).reshape(tensor.shape[0], tensor.shape[1] // BLOCK, -1)
    return _PACK[tensor.quantization](data)


def _q4_0(data: NDArray[np.uint8]) -> PackedTensor:
    """A scale and nibbles less 8."""
    scales = _halves(data, 0)
    return PackedTensor(data[..., _HALF_BYTES:], scales, scales * np.float16(-8))


def _q4_1(data: NDArray[np.uint8]) -> PackedTensor:
    """A scale, a minimum and nibbles."""
    return PackedTensor(data[..., 2 * _HALF_BYTES :], _halves(data, 0), _halves(data, 1))


def _q8_0(data: NDArray[np.uint8]) -> PackedTensor:
    """A scale and bytes."""
    return PackedTensor(data[..., _HALF_BYTES:].view(np.int8), _halves(data, 0), None)


_PACK: dict[str, Callable[[NDArray[np.uint8]], PackedTensor]] = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q8_0": _q8_0}


def _halves(data: NDArray[np.uint8], index: int) -> NDArray[np.float16]:
    start = index * _HALF_BYTES
    return np.ascontiguousarray(data[..., start : start + _HALF_BYTES]).view(np.float16)[..., 0]
