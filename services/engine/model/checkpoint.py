"""Tensors of a safetensors folder by name, one file or sharded, checked as they are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from services.engine.model.errors import ModelCorrupt, ModelNotFound, UnsupportedModel
from services.engine.model.json_fields import read_json
from services.engine.model.linear.blocks import BLOCK, Blocks

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Matrices of the others as linear layers can take them: NAME.numbers, NAME.scales, NAME.minimums, see linear.blocks.
PACKED_FILE = "model.packed"
SAMPLES_PER_TENSOR, SAMPLE_BYTES = 16, 256


class Checkpoint:
    """The tensors of one model. Each is read once, into memory the caller owns."""

    def __init__(self, folder: Path, handles: dict[str, tuple[Path, Any]], packed: dict[str, tuple[Path, Any]]) -> None:
        self._folder = folder
        self._handles = handles  # tensor name -> (file, open safetensors handle)
        self._packed = packed  # the same of PACKED_FILE
        self._unread = set(handles)
        self._identity = blake2b(digest_size=16)
        self.has_read_packed = False

    def __contains__(self, name: str) -> bool:
        return name in self._handles

    def require(self, name: str, shape: Sequence[int]) -> None:
        """Raises ModelCorrupt, naming file and tensor, unless there is one of that shape. To be asked before memory is
        taken for it: a configuration may claim any size."""
        if name not in self._handles:
            raise ModelCorrupt(f"{self._folder} lacks the tensor {name}.")
        path, handle = self._handles[name]
        there = tuple(handle.get_slice(name).get_shape())
        if there != tuple(shape):
            raise ModelCorrupt(f"{path}: the tensor {name} has shape {there} where {tuple(shape)} is needed.")

    def read_into(self, name: str, target: Tensor, shape: Sequence[int], part: tuple[slice, ...] = ()) -> None:
        """Copies `part` of a tensor of `shape` into `target`, converting dtype and device.

        Raises ModelCorrupt naming file and tensor.
        """
        self.require(name, shape)
        path, handle = self._handles[name]
        tensor = _tensor(path, handle, name)
        if not tensor.is_floating_point():
            raise UnsupportedModel(f"{path}: the tensor {name} holds {tensor.dtype}, which this engine does not read.")
        self._unread.discard(name)
        self._identify(name, tensor)
        target.copy_(tensor[part])

    def is_packed(self, names: Sequence[str]) -> bool:
        """Whether read_packed can read all of these, and their numbers have the same bits."""
        kinds = {(f"{name}.numbers" in self._packed, f"{name}.minimums" in self._packed) for name in names}
        return kinds in ({(True, False)}, {(True, True)})

    def read_packed(self, name: str, shape: tuple[int, int]) -> Blocks:
        """A matrix of `shape` that is packed. Raises ModelCorrupt naming file and tensor."""
        self.has_read_packed = True
        parts = {}
        for part in ("numbers", "scales", "minimums"):
            if f"{name}.{part}" in self._packed:
                path, handle = self._packed[f"{name}.{part}"]
                parts[part] = _tensor(path, handle, f"{name}.{part}")
                self._identify(f"{name}.{part}", parts[part])
        blocks = Blocks(shape[1], parts["numbers"], parts["scales"], parts.get("minimums"))
        num_blocks = (shape[0], -(-shape[1] // BLOCK))
        held = BLOCK if blocks.minimums is None else BLOCK // 2
        if blocks.numbers.shape != (*num_blocks, held) or any(
            halves is not None and halves.shape != num_blocks for halves in (blocks.scales, blocks.minimums)
        ):
            raise ModelCorrupt(f"{self._folder / PACKED_FILE}: the tensor {name} is not {shape[0]} x {shape[1]}.")
        self._unread.discard(name)
        return blocks

    def require_all_read(self, *, prefixes: tuple[str, ...] = (), suffixes: tuple[str, ...] = ()) -> None:
        """Raises ModelCorrupt for a tensor that the model has no use for: its numbers would be wrong without it.

        Names that begin with one of `prefixes` or end in one of `suffixes` are known to be of no use.
        """
        for name in sorted(self._unread):
            if not name.startswith(prefixes) and not name.endswith(suffixes):
                raise ModelCorrupt(f"{self._handles[name][0]}: the tensor {name} does not belong to this architecture.")

    def identify_all(self) -> None:
        """Takes samples of every tensor for the identity, where somebody else reads them. Raises ModelCorrupt."""
        for name in sorted(self._handles):
            self._identify(name, _tensor(*self._handles[name], name))

    def identity(self) -> bytes:
        """16 bytes that depend on name, shape, dtype and a sample of the values of every tensor read so far.

        16 evenly spread samples of 256 bytes a tensor tell fine-tunes and quantisations apart at no cost; an edit
        of single weights between the samples goes unseen.
        """
        return self._identity.digest()

    def _identify(self, name: str, tensor: Tensor) -> None:
        self._identity.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\0".encode())
        # Flat first: a number by itself has no bytes to be seen as.
        content = tensor.flatten().view(torch.uint8).numpy()
        if content.size <= SAMPLES_PER_TENSOR * SAMPLE_BYTES:
            self._identity.update(content.tobytes())
            return
        last = content.size - SAMPLE_BYTES
        for sample in range(SAMPLES_PER_TENSOR):
            start = last * sample // (SAMPLES_PER_TENSOR - 1)
            self._identity.update(content[start : start + SAMPLE_BYTES].tobytes())


@contextmanager
def open_checkpoint(folder: Path) -> Iterator[Checkpoint]:
    """The checkpoint in `folder`, its files open until the block ends.

    Raises ModelNotFound or UnsupportedModel without safetensors files, ModelCorrupt for a truncated or missing one.
    """
    with ExitStack() as open_files:
        handles: dict[str, tuple[Path, Any]] = {}
        for path, expected in _files(folder).items():
            held = _handles(path, open_files)
            if missing := sorted(expected - set(held)):
                raise ModelCorrupt(f"{path} lacks the tensor {missing[0]} that {INDEX_FILE} promises.")
            handles.update(held)
        packed = folder / PACKED_FILE
        yield Checkpoint(folder, handles, _handles(packed, open_files) if packed.is_file() else {})


def _handles(path: Path, open_files: ExitStack) -> dict[str, tuple[Path, Any]]:
    """The names of a file's tensors, each with the file and its handle."""
    try:
        handle = open_files.enter_context(safe_open(path, framework="pt"))
        return dict.fromkeys(handle.keys(), (path, handle))
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelCorrupt(f"{path} is not a whole safetensors file: {error}.") from error


def _tensor(path: Path, handle: Any, name: str) -> Tensor:
    try:
        tensor: Tensor = handle.get_tensor(name)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ModelCorrupt(f"{path}: the tensor {name} cannot be read: {error}.") from error
    return tensor


def _files(folder: Path) -> dict[Path, set[str]]:
    """The files, and the tensors the index promises to be in each."""
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.is_file():
        return {single: set()}
    if not index.is_file():
        if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
            raise UnsupportedModel(f"{folder} holds pickled weights only; this engine reads safetensors.")
        raise ModelNotFound(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}.")
    shards: dict[Path, set[str]] = {}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ModelCorrupt(f"{index} has no weight_map.")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise ModelCorrupt(f"{index}: the shard {file_name!r} is not a file name.")
        shards.setdefault(folder / file_name, set()).add(name)
    for path in shards:
        if not path.is_file():
            raise ModelCorrupt(f"{path} is missing, though {INDEX_FILE} names it.")
    return shards
