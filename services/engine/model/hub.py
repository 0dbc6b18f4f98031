"""Models of the Hugging Face hub, in the cache of its library; a file goes on where an earlier process stopped."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from services.engine.model.blobs import LargeFile, lay_blobs
from services.engine.model.errors import ModelCorrupt, ModelError, ModelNotFound
from services.engine.model.progress import download_progress

_FILES = ["*.safetensors", "*.json", "*.jinja"]
_IGNORED = ["*/*", "consolidated*"]  # other formats of the same weights
_ANSWER_S = 10.0


@dataclass(frozen=True, slots=True)
class _Listing:
    """What a model is at this moment: its commit, and its large files that are wanted."""

    commit: str
    large: list[LargeFile]


def fetch_from_hub(name: str, file: str | None, show_progress: bool) -> Path:
    """The folder of a hub model, or one GGUF file of it; what is in the library's cache needs no hub.

    Raises ModelNotFound with the reason, ModelCorrupt for a file that arrived altered or a listing that cannot be, and
    ModelError for a cache that cannot be written.
    """
    try:
        from huggingface_hub import hf_hub_download, snapshot_download
    except ImportError as error:
        raise ModelNotFound(f"To fetch {name} from the Hugging Face hub, install huggingface_hub.") from error

    def get(**options: Any) -> Path:
        if file is not None:
            return Path(hf_hub_download(name, file, **options))
        return Path(snapshot_download(name, allow_patterns=_FILES, ignore_patterns=_IGNORED, **options))

    try:
        try:
            listing = _listing(name, file)
        except ModelCorrupt:
            raise
        except Exception as error:  # the library's own, its HTTP client's, or OSError: the hub cannot be asked
            return _cached_or(error, get)
        missing = [each for each in listing.large if not each.blob.exists()]
        if missing:
            with _bars_hidden(), download_progress(f"Downloading {name}", show_progress) as progress:
                lay_blobs(missing, progress)
        return _rest(name, listing.commit, get, show_progress)
    except ModelError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelNotFound(f"{name} could not be fetched from the Hugging Face hub: {reason}") from error


def _cached_or(error: Exception, get: Callable[..., Path]) -> Path:
    """What was fetched before, whole; `error` if it was not."""
    try:
        path = get(local_files_only=True)
    except Exception:
        raise error from None
    # The library knows what a snapshot lacks only where it has fetched one; single files make a folder too.
    if path.is_dir() and not (path / "config.json").is_file():
        raise error
    return path


def _rest(name: str, commit: str, get: Callable[..., Path], show_progress: bool) -> Path:
    """The library's part: small files, those above the limit of plain HTTP, and the links to what is there."""
    if show_progress:
        path = get(revision=commit)
    else:
        with _bars_hidden():
            path = get(revision=commit)
    _note_newest(_storage(name) / "refs" / "main", commit)
    return path


def _note_newest(note: Path, commit: str) -> None:
    """The library's note of the commit that serves without the hub, which it does not take when a commit is named."""
    if note.is_file() and note.read_text() == commit:
        return  # a cache that is whole need not be writable
    note.parent.mkdir(parents=True, exist_ok=True)
    unfinished = note.with_name(f".main.{uuid4().hex}")  # containers that share the cache share process ids too
    unfinished.write_text(commit)
    unfinished.replace(note)


def _listing(name: str, file: str | None) -> _Listing:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils import filter_repo_objects

    info = HfApi().model_info(name, files_metadata=True, timeout=_ANSWER_S)
    large = {each.rfilename: each.lfs for each in info.siblings or () if each.lfs is not None}
    if file is None:
        wanted = list(filter_repo_objects(large, allow_patterns=_FILES, ignore_patterns=_IGNORED))
    else:
        wanted = [file] if file in large else []
    commit = str(info.sha)
    if not re.fullmatch("[0-9a-f]{40}", commit):
        raise ModelCorrupt(f"The hub tells a commit of {name} that is none: {commit!r:.80}.")
    for each in wanted:
        _check(name, each, large[each].sha256, large[each].size)
    storage = _storage(name)
    locks = storage.parent / ".locks" / storage.name
    files = {  # one of each content
        large[each].sha256: LargeFile(
            name,
            commit,
            each,
            large[each].size,
            large[each].sha256,
            storage / "blobs" / large[each].sha256,
            locks / f"{large[each].sha256}.lock",
        )
        for each in wanted
        if 0 < large[each].size <= constants.MAX_HTTP_DOWNLOAD_SIZE  # the library has another protocol for the others
    }
    return _Listing(commit, list(files.values()))


def _check(model: str, file: str, sha256: object, num_bytes: object) -> None:
    """The hash becomes a path, and the size bounds what is written: neither is taken on trust."""
    if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ModelCorrupt(f"The hub tells a SHA-256 of {file} of {model} that is none: {sha256!r:.80}.")
    if type(num_bytes) is not int or num_bytes < 0:
        raise ModelCorrupt(f"The hub tells a size of {file} of {model} that is none: {num_bytes!r:.80}.")


def _storage(name: str) -> Path:
    """The model's folder in the library's cache."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / str(repo_folder_name(repo_id=name, repo_type="model"))


@contextmanager
def _bars_hidden() -> Iterator[None]:
    """Without the library's own bars."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
