"""The cached folder of a GGUF file, keyed by the content of the file."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

from services.engine.model.cache import cache_root, ensure_folder
from services.engine.model.config import parse_config
from services.engine.model.errors import ModelNotFound
from services.engine.model.gguf.config import generation_config, transformers_config
from services.engine.model.gguf.reader import GgufFile
from services.engine.model.gguf.tokenizer import tokenizer_files
from services.engine.model.gguf.weights import write_safetensors

CONVERTER_VERSION = 3  # raised when the same file would convert to other bytes
HASH_BLOCK_BYTES = 1 << 20


def converted_folder(path: Path) -> Path:
    """A folder as transformers writes it with the model of the GGUF file `path`; converts it on first use.

    Raises ModelNotFound without the file, ModelCorrupt naming it, UnsupportedModel.
    """
    if not path.is_file():
        raise ModelNotFound(f"There is no file {path}.")
    try:
        content = _content_hash(path)
    except OSError as error:
        raise ModelNotFound(f"{path} cannot be read: {error}.") from error
    folder = cache_root() / "converted" / f"{content}-{CONVERTER_VERSION}"
    ensure_folder(folder, lambda unfinished: convert(path, unfinished))
    return folder


def convert(path: Path, folder: Path) -> None:
    """Writes the model of the GGUF file `path` into the empty `folder`. Raises ModelCorrupt or UnsupportedModel."""
    file = GgufFile(path)
    config, generation = transformers_config(file), generation_config(file)
    parse_config(config, generation, path)  # refuse before the long part
    for name, content in tokenizer_files(file).items():
        (folder / name).write_bytes(content)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", generation)
    write_safetensors(file, config, folder)


def _content_hash(path: Path) -> str:
    """Hash of the file's bytes, remembered under its inode, size and time of change: reading all takes seconds."""
    status = os.stat(path)
    identity = f"{path.resolve()} {status.st_dev} {status.st_ino} {status.st_size} {status.st_mtime_ns}"
    note = cache_root() / "hashes" / blake2b(identity.encode(), digest_size=16).hexdigest()
    if note.is_file() and len(known := note.read_text()) == 32:
        return known
    digest = blake2b(digest_size=16)
    with path.open("rb") as stream:
        while block := stream.read(HASH_BLOCK_BYTES):
            digest.update(block)
    with suppress(OSError):  # then the next start reads the file again
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(digest.hexdigest())
    return digest.hexdigest()


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
