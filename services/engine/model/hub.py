"""Models of the Hugging Face hub, in the cache of its library; a file goes on where an earlier process stopped.

The library keeps the whole files of an interrupted download, but begins the one under way anew. So large files are laid
into its cache here, as its guide to the cache describes that (huggingface.co/docs/huggingface_hub/guides/manage-cache):
blobs/SHA256 is the content of one. All else is the library's.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from services.engine.model.cache import cache_root, locked
from services.engine.model.errors import ModelCorrupt, ModelNotFound
from services.engine.model.progress import DownloadProgress, download_progress

_FILES = ["*.safetensors", "*.json", "*.jinja"]
_IGNORED = ["*/*", "consolidated*"]  # other formats of the same weights
_ANSWER_S = 10.0
_MAX_HTTP_BYTES = 50_000_000_000  # the hub hands out larger files by another protocol, which the library knows


@dataclass(frozen=True, slots=True)
class _LargeFile:
    """A file that the hub keeps outside of git."""

    model: str
    commit: str
    name: str
    num_bytes: int
    sha256: str
    blob: Path


def fetch_from_hub(name: str, file: str | None, show_progress: bool) -> Path:
    """The folder of a hub model, or one GGUF file of it; what is in the library's cache needs no hub.

    Raises ModelNotFound with the reason, and ModelCorrupt for a file that arrived altered.
    """
    try:
        from huggingface_hub import hf_hub_download, snapshot_download
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ImportError as error:
        raise ModelNotFound(f"To fetch {name} from the Hugging Face hub, install huggingface_hub.") from error
    disable_progress_bars()  # ours says how far the large files are

    def get(**options: Any) -> Path:
        if file is not None:
            return Path(hf_hub_download(name, file, **options))
        return Path(snapshot_download(name, allow_patterns=_FILES, ignore_patterns=_IGNORED, **options))

    try:
        try:
            missing = [each for each in _large_files(name, file) if not each.blob.exists()]
        except Exception as error:  # the library's own, its HTTP client's, or OSError: the hub cannot be asked
            return _cached_or(error, get)
        if missing:
            with download_progress(f"Downloading {name}", show_progress) as progress:
                _lay_blobs(missing, progress)
        return get()
    except ModelCorrupt:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelNotFound(f"{name} could not be fetched from the Hugging Face hub: {reason}") from error


def _cached_or(error: Exception, get: Callable[..., Path]) -> Path:
    """What was fetched before, whole; `error` if it was not."""
    try:
        return get(local_files_only=True)
    except Exception:
        raise error from None


def _large_files(name: str, file: str | None) -> list[_LargeFile]:
    from huggingface_hub import HfApi, constants

    info = HfApi().model_info(name, files_metadata=True, timeout=_ANSWER_S)
    large = {each.rfilename: each.lfs for each in info.siblings or () if each.lfs is not None}
    if file is None:
        wanted = [each for each in large if _matches(each, _FILES) and not _matches(each, _IGNORED)]
    else:
        wanted = [file] if file in large else []
    blobs = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "blobs"
    found = [(each, large[each]) for each in wanted]
    return [
        _LargeFile(name, str(info.sha), each, lfs.size, lfs.sha256, blobs / lfs.sha256)
        for each, lfs in found
        if lfs.size <= _MAX_HTTP_BYTES
    ]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _lay_blobs(files: Sequence[_LargeFile], progress: DownloadProgress) -> None:
    total, before = sum(file.num_bytes for file in files), 0
    for file in files:

        def report(num_bytes: int, before: int = before) -> None:
            progress.update(before + num_bytes, total)

        _lay_blob(file, report, lambda: progress.note("another process is downloading it"))
        before += file.num_bytes


def _lay_blob(file: _LargeFile, report: Callable[[int], None], on_wait: Callable[[], None]) -> None:
    """One process at a time downloads a file; the others find it there."""
    lock = cache_root() / "hub" / f"{file.sha256}.lock"
    for folder in (file.blob.parent, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(lock, on_wait):
        if file.blob.exists():
            return
        part = file.blob.with_name(f"{file.sha256}.incomplete")
        _download_rest(file, part, report)
        if _sha256(part) != file.sha256:
            part.unlink()
            raise ModelCorrupt(f"{file.name} of {file.model} arrived altered: its SHA-256 differs. Try again.")
        part.rename(file.blob)


def _download_rest(file: _LargeFile, part: Path, report: Callable[[int], None]) -> None:
    from huggingface_hub import get_token, hf_hub_url
    from huggingface_hub.file_download import http_get

    token = get_token()
    with io.BufferedWriter(_Growing(part, report)) as output:
        if output.tell() > file.num_bytes:
            output.truncate(0)
            output.seek(0)
        report(output.tell())
        http_get(
            hf_hub_url(file.model, file.name, revision=file.commit),
            output,
            resume_size=output.tell(),
            headers={"authorization": f"Bearer {token}"} if token else {},
            expected_size=file.num_bytes,
            displayed_filename=file.name,
        )


class _Growing(io.FileIO):
    """A file that is written at its end, and tells how long it is."""

    def __init__(self, path: Path, report: Callable[[int], None]) -> None:
        super().__init__(path, "a")
        self.seek(0, io.SEEK_END)
        self._report = report

    def write(self, data: Any, /) -> int:
        """See io.FileIO."""
        count = super().write(data)
        self._report(self.tell())
        return count


def _sha256(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
