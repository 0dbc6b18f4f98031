"""Many small arrays in one copy to a device: a copy costs as much for a number as for a thousand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

_TORCH = {np.dtype(np.int64): torch.int64, np.dtype(np.float64): torch.float64, np.dtype(np.uint8): torch.uint8}


@dataclass(frozen=True, slots=True)
class Place:
    """Where an array lies among the 64-bit words of a copy."""

    begin: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Packed:
    """What a Packer collected, on the device."""

    def __init__(self, words: Tensor) -> None:
        self._words = words  # (n,) int64

    def __getitem__(self, place: Place) -> Tensor:
        """The array at a place: a view, of its shape and dtype."""
        num_elements = int(np.prod(place.shape))
        return self._words[place.begin :].view(place.dtype)[:num_elements].view(place.shape)


class Packer:
    """Collects arrays of int64, float64 and uint8; each begins at a word."""

    def __init__(self) -> None:
        self._parts: list[NDArray[np.int64]] = []
        self._num_words = 0

    def add(self, array: NDArray[np.int64] | NDArray[np.float64] | NDArray[np.uint8]) -> Place:
        """Copies an array; Packed knows it by the place."""
        place = Place(self._num_words, array.shape, _TORCH[array.dtype])
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        words = np.zeros(-(-flat.size // 8), dtype=np.int64)
        words.view(np.uint8)[: flat.size] = flat
        self._parts.append(words)
        self._num_words += words.size
        return place

    def integers(self, values: ArrayLike | Sequence[int]) -> Place:
        """The same for what numpy makes int64 of."""
        return self.add(np.asarray(values, dtype=np.int64))

    def numbers(self, values: ArrayLike | Sequence[float]) -> Place:
        """The same for what numpy makes float64 of."""
        return self.add(np.asarray(values, dtype=np.float64))

    def send(self, device: torch.device) -> Packed:
        """Copies all of it, on a GPU behind what its stream does already, without waiting."""
        words = torch.from_numpy(np.concatenate((*self._parts, np.zeros(1, dtype=np.int64))))
        if device.type != "cuda":
            return Packed(words)
        return Packed(words.pin_memory().to(device, non_blocking=True))
