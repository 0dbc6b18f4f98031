"""A GGUF file as typed metadata and named tensors (github.com/ggml-org/ggml, docs/gguf.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from services.engine.model.errors import ModelCorrupt, UnsupportedModel


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor as it stands in the file: dimensions outermost first, data still quantised."""

    name: str
    shape: tuple[int, ...]
    quantization: str  # ggml's name: F32, F16, BF16, Q4_1, ...
    data: NDArray[Any]

    def dequantized(self) -> NDArray[np.float32]:
        """The values, of `shape`. Raises UnsupportedModel for a quantisation the gguf package cannot undo."""
        kind = gguf.GGMLQuantizationType[self.quantization]
        try:
            values = gguf.quants.dequantize(self.data, kind)
        except NotImplementedError as error:
            raise UnsupportedModel(f"The quantisation {self.quantization} of {self.name} is not supported.") from error
        return np.ascontiguousarray(values, dtype=np.float32).reshape(self.shape)


class GgufFile:
    """One open file. Every failure to make sense of it is ModelCorrupt and names it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            reader = gguf.GGUFReader(path)
            self._metadata = {name: field.contents() for name, field in reader.fields.items()}
            self.tensors = {tensor.name: _tensor(tensor) for tensor in reader.tensors}
        # The package answers bad bytes with whatever numpy or its own asserts raise.
        except Exception as error:
            raise ModelCorrupt(f"{path} is not a whole GGUF file: {error or type(error).__name__}.") from error
        self.architecture = self.text("general.architecture")

    def own(self, name: str) -> str:
        """The full name of metadata that stands under the architecture's own."""
        return f"{self.architecture}.{name}"

    def get(self, name: str) -> Any:
        """Metadata, or None."""
        return self._metadata.get(name)

    def text(self, name: str) -> str:
        """A text that must be there."""
        value = self.get(name)
        if not isinstance(value, str):
            raise ModelCorrupt(f"{self.path} has no text {name}.")
        return value

    def optional_text(self, name: str) -> str | None:
        """A text, or None."""
        return None if self.get(name) is None else self.text(name)

    def number(self, name: str, default: float | None = None) -> float:
        """A number that must be there unless it has a default. Lists, one entry a layer, are UnsupportedModel."""
        value = self.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, list):
            raise UnsupportedModel(f"{self.path} has a different {name} in each layer, which is not supported.")
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise ModelCorrupt(f"{self.path} has no number {name}.")
        return value

    def count(self, name: str, default: int | None = None) -> int:
        """An integer that must be there unless it has a default."""
        return int(self.number(name, default))

    def optional_count(self, name: str) -> int | None:
        """An integer, or None."""
        return None if self.get(name) is None else self.count(name)

    def optional_number(self, name: str) -> float | None:
        """A number, or None."""
        return None if self.get(name) is None else self.number(name)

    def texts(self, name: str) -> list[str]:
        """A list of texts that must be there."""
        return self._list(name, str, "texts")

    def numbers(self, name: str) -> list[float]:
        """A list of numbers that must be there."""
        return self._list(name, int | float, "numbers")

    def special_token(self, name: str, tokens: Sequence[str]) -> str | None:
        """The token that the file gives a part to (bos, eos, unknown, padding), if it does. Raises ModelCorrupt if it
        is not one of `tokens`."""
        index = self.optional_count(f"tokenizer.ggml.{name}_token_id")
        if index is None:
            return None
        if not 0 <= index < len(tokens):
            raise ModelCorrupt(f"{self.path}: the {name} token {index} is not in its vocabulary.")
        return tokens[index]

    def _list(self, name: str, kind: Any, what: str) -> list[Any]:
        value = self.get(name)
        if not isinstance(value, list) or not all(isinstance(each, kind) for each in value):
            raise ModelCorrupt(f"{self.path} has no list of {what} {name}.")
        return value


def _tensor(tensor: Any) -> GgufTensor:
    shape = tuple(int(size) for size in reversed(tensor.shape))  # ggml counts from the innermost
    return GgufTensor(tensor.name, shape, tensor.tensor_type.name, tensor.data)
