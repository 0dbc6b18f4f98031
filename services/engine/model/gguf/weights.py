"""Tensors of a GGUF file written as safetensors under the names and in the arrangement of transformers."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.engine.model.errors import UnsupportedModel
from services.engine.model.gguf.architectures import architecture_of
from services.engine.model.gguf.config import OUTPUT_HEAD, ROPE_DIVISORS
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


def write_safetensors(file: GgufFile, config: dict[str, Any], target: Path) -> None:
    """Converts one tensor at a time, so that a model larger than memory converts too."""
    architecture = architecture_of(file)
    names = architecture.layer_names
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    stored = [tensor for tensor in file.tensors.values() if tensor.name != ROPE_DIVISORS]
    tensors = [(_name(file, tensor, names), tensor) for tensor in stored]
    header, end = _header(tensors)
    with target.open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        for _, tensor in tensors:
            layer_tensor = LAYER_TENSOR.fullmatch(tensor.name)
            num_heads = heads.get(layer_tensor[2]) if layer_tensor and architecture.is_permuted else None
            values = _values(tensor)
            if architecture.norm_offset and tensor.name.endswith("norm.weight"):
                values = values - np.float32(architecture.norm_offset)
            stream.write((_unpermuted(values, num_heads) if num_heads else values).tobytes())
        if stream.tell() != 8 + len(header) + end:
            raise UnsupportedModel(f"{file.path.name} has a tensor whose stored size is not that of its shape.")


def _name(file: GgufFile, tensor: GgufTensor, layer_names: Mapping[str, str]) -> str:
    if tensor.name in TOP_NAMES:
        return TOP_NAMES[tensor.name]
    match = LAYER_TENSOR.fullmatch(tensor.name)
    if match is None or match[2] not in layer_names:
        raise UnsupportedModel(f"{file.path.name} has a tensor {tensor.name}, which {file.architecture} models lack.")
    return f"model.layers.{match[1]}.{layer_names[match[2]]}.{match[3]}"


def _header(tensors: list[tuple[str, GgufTensor]]) -> tuple[bytes, int]:
    """The safetensors header, padded to 8 bytes so that data is aligned, and the length of the data."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors:
        dtype = KEPT_FORMATS.get(tensor.quantization, "F32")
        start, end = end, end + int(np.prod(tensor.shape)) * (4 if dtype == "F32" else 2)
        entries[name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": (start, end)}
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
