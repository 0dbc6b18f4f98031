"""Tensors of a GGUF file written as safetensors under the names and in the arrangement of transformers."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.engine.model.checkpoint import PACKED_FILE, SINGLE_FILE
from services.engine.model.errors import ModelCorrupt, UnsupportedModel
from services.engine.model.gguf.architectures import architecture_of
from services.engine.model.gguf.config import OUTPUT_HEAD, ROPE_DIVISORS
from services.engine.model.gguf.packing import is_packable, packed
from services.engine.model.gguf.reader import GgufFile, GgufTensor

TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    OUTPUT_HEAD: "lm_head.weight",
}
LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
# 16-bit formats are kept as they are. A quantised value is a 16-bit scale times an integer, plus an offset: more
# bits than either 16-bit format holds, so float32 it is; the cache is larger, the logits are those of the file.
KEPT_FORMATS = {"F16": "F16", "BF16": "BF16"}
# safetensors' names, and the bytes of a value.
DTYPES = {np.dtype(np.uint8): "U8", np.dtype(np.int8): "I8", np.dtype(np.float16): "F16"}
BYTES_OF = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4}

_Entry = tuple[str, str, tuple[int, ...]]  # name, dtype and shape of a tensor


def write_safetensors(file: GgufFile, config: dict[str, Any], folder: Path) -> None:
    """Converts one tensor at a time, so that a model larger than memory converts too.

    Every tensor goes into the usual file; those that linear layers can take as they are, packed, into another one too.
    """
    stored = [tensor for tensor in file.tensors.values() if tensor.name != ROPE_DIVISORS]
    names = architecture_of(file).layer_names
    tensors = [(_name(file, tensor, names), tensor) for tensor in stored]
    rows = _Rows(file, config)
    whole = [(name, KEPT_FORMATS.get(tensor.quantization, "F32"), tensor.shape) for name, tensor in tensors]
    _write(folder / SINGLE_FILE, whole, (rows.in_order(tensor, _values(tensor)) for _, tensor in tensors))
    matrices = [(name, tensor) for name, tensor in tensors if is_packable(tensor)]
    if matrices:
        parts = [
            (f"{name}.{part}", DTYPES[array.dtype], array.shape)
            for name, tensor in matrices
            for part, array in packed(tensor).arrays().items()
        ]
        arrays = (rows.in_order(tensor, array) for _, tensor in matrices for array in packed(tensor).arrays().values())
        _write(folder / PACKED_FILE, parts, arrays)


class _Rows:
    """Gives rows and norms back the form that transformers means."""

    def __init__(self, file: GgufFile, config: dict[str, Any]) -> None:
        self._path, self._architecture = file.path, architecture_of(file)
        self._heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}

    def in_order(self, tensor: GgufTensor, values: NDArray[Any]) -> NDArray[Any]:
        """What belongs to a tensor, rows first."""
        layer_tensor = LAYER_TENSOR.fullmatch(tensor.name)
        num_heads = self._heads.get(layer_tensor[2]) if layer_tensor and self._architecture.is_permuted else None
        if self._architecture.norm_offset and tensor.name.endswith("norm.weight"):
            values = values - np.float32(self._architecture.norm_offset)
        if not num_heads:
            return values
        if values.shape[0] % (2 * num_heads):
            raise ModelCorrupt(f"{self._path}: the {values.shape[0]} rows of {tensor.name} are no {num_heads} heads.")
        return _unpermuted(values, num_heads)


def _write(target: Path, entries: list[_Entry], arrays: Iterable[NDArray[Any]]) -> None:
    header, end = _header(entries)
    with target.open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        for array in arrays:
            stream.write(array.tobytes())
        if stream.tell() != 8 + len(header) + end:
            raise UnsupportedModel(f"{target.name}: a tensor of the GGUF file has another size than its shape says.")


def _name(file: GgufFile, tensor: GgufTensor, layer_names: Mapping[str, str]) -> str:
    if tensor.name in TOP_NAMES:
        return TOP_NAMES[tensor.name]
    match = LAYER_TENSOR.fullmatch(tensor.name)
    if match is None or match[2] not in layer_names:
        raise UnsupportedModel(f"{file.path.name} has a tensor {tensor.name}, which {file.architecture} models lack.")
    return f"model.layers.{match[1]}.{layer_names[match[2]]}.{match[3]}"


def _header(tensors: list[_Entry]) -> tuple[bytes, int]:
    """The safetensors header, padded to 8 bytes so that data is aligned, and the length of the data."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + int(np.prod(shape)) * BYTES_OF[dtype]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": (start, end)}
    header = json.dumps(entries).encode()
    return header + b" " * (-len(header) % 8), end


def _values(tensor: GgufTensor) -> NDArray[Any]:
    if tensor.quantization in KEPT_FORMATS:
        return np.ascontiguousarray(tensor.data).view(np.uint16).reshape(tensor.shape)
    return tensor.dequantized()


def _unpermuted(values: NDArray[Any], num_heads: int) -> NDArray[Any]:
    """Undoes llama.cpp's order of query and key rows.

    Within a head it interleaves the two halves, so that rotary pairs are neighbours; transformers pairs row i with
    row i + head_dim / 2.
    """
    pairs = values.reshape(num_heads, values.shape[0] // num_heads // 2, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
