"""Large files of the Hugging Face hub, laid into the cache of its library; a download goes on where one stopped.

The library keeps the whole files of an interrupted download, but begins the one under way anew. So large files are laid
into its cache here, as its guide to the cache describes that (huggingface.co/docs/huggingface_hub/guides/manage-cache):
blobs/SHA256 is the content of one, and .locks holds the lock that the library takes for it too.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Lock, Thread
from typing import Any, TypeVar

from services.engine.model.errors import ModelCorrupt, ModelError
from services.engine.model.progress import DownloadProgress

_MAX_THREADS = 8  # as many as the library has
_TRY_S, _PAUSE_S, _MAX_WAIT_S = 0.01, 0.2, 6 * 3600.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LargeFile:
    """A file that the hub keeps outside of git. `blob` is where it belongs, `lock` guards that."""

    model: str
    commit: str
    name: str
    num_bytes: int
    sha256: str
    blob: Path
    lock: Path


def lay_blobs(files: Sequence[LargeFile], progress: DownloadProgress) -> None:
    """Lays all of them, several at once; the first failure is raised at once, and what came of the others stays.

    Raises ModelCorrupt for a file that arrived altered, ModelError for a cache that cannot be written, and what the
    library raises where the hub cannot be asked.
    """
    shared = _Shared(sum(file.num_bytes for file in files), progress)
    waiting: SimpleQueue[LargeFile] = SimpleQueue()
    ends: SimpleQueue[BaseException | None] = SimpleQueue()
    for file in files:
        waiting.put(file)

    def work() -> None:
        while True:
            try:
                _lay_blob(waiting.get_nowait(), shared)
                ends.put(None)
            except Empty:
                return
            except BaseException as error:
                ends.put(error)
                return

    for _ in files[:_MAX_THREADS]:
        # No executor: an exit would join its threads, so an interrupt would wait for a hub that stands still.
        Thread(target=work, daemon=True).start()
    try:
        for _ in files:
            if (error := ends.get()) is not None:
                raise error
    finally:
        shared.ended.set()


class _Ended(Exception):
    """Another file failed, or the caller was interrupted."""


class _Shared:
    """What the downloads of one model share: their progress and their end."""

    def __init__(self, total: int, progress: DownloadProgress) -> None:
        self.ended = Event()
        self._total, self._progress = total, progress
        self._lock, self._done, self._noted = Lock(), dict[str, int](), False

    def report(self, file: LargeFile, num_bytes: int) -> None:
        """So much of the file is there. Raises _Ended."""
        with self._lock:
            self.check()
            self._done[file.sha256] = num_bytes
            self._progress.update(sum(self._done.values()), self._total)

    def check(self) -> None:
        """Raises _Ended."""
        if self.ended.is_set():
            raise _Ended

    def take(self, file: LargeFile, attempt: Callable[[], T]) -> T:
        """What attempt() returns as soon as no other process is in the way of it, for which it raises."""
        from filelock import Timeout

        give_up = time.monotonic() + _MAX_WAIT_S
        while time.monotonic() < give_up:
            try:
                return attempt()
            except (Timeout, BlockingIOError):
                self._note()
                self.ended.wait(_PAUSE_S)
                self.check()
        raise ModelError(f"{file.name} of {file.model} is held by another process, which does not end: {file.lock}.")

    def _note(self) -> None:
        with self._lock:
            if not self._noted:
                self._progress.note("another process is downloading it")
            self._noted = True


def _lay_blob(file: LargeFile, shared: _Shared) -> None:
    """One process at a time downloads a file; the others find it there."""
    from huggingface_hub.utils import WeakFileLock

    with _writing(file.blob.parent):
        for folder in (file.blob.parent, file.lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        shared.take(file, lambda: held.enter_context(WeakFileLock(file.lock, timeout=_TRY_S)))
        if not file.blob.exists():
            part = held.enter_context(shared.take(file, lambda: _Part(file, shared)))
            if file.blob.exists():  # from somebody who has another lock
                part.path.unlink()
            else:
                _complete(part, file)
        shared.report(file, file.num_bytes)


def _complete(part: _Part, file: LargeFile) -> None:
    try:
        _download(part, file)
    except ModelCorrupt:
        part.path.unlink()
        raise
    with _writing(file.blob.parent):
        os.fsync(part.fileno())
        part.path.rename(file.blob)


def _download(part: _Part, file: LargeFile) -> None:
    """Fills the part. One that was begun earlier and comes out wrong is begun anew, once."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    begun = part.tell()
    http_get(
        hf_hub_url(file.model, file.name, revision=file.commit),
        part,
        resume_size=begun,
        headers=build_hf_headers(),
        expected_size=file.num_bytes,
        displayed_filename=file.name,
    )
    with part.path.open("rb") as content:
        sha256 = hashlib.file_digest(content, "sha256").hexdigest()
    if sha256 == file.sha256:
        return
    if not begun:
        raise ModelCorrupt(f"{file.name} of {file.model} arrived altered: its SHA-256 differs. Try again.")
    part.restart()
    _download(part, file)


class _Part(io.FileIO):
    """What there is of a file: written at its end, by one process at a time even where they do not share the lock.

    Raises BlockingIOError where another one holds it. The name is ours: the library appends to its own.
    """

    def __init__(self, file: LargeFile, shared: _Shared) -> None:
        self.path = file.blob.with_name(f"{file.sha256}.microserve.incomplete")
        self._file, self._shared = file, shared
        with _writing(self.path.parent):
            super().__init__(self.path, "a")
        try:
            fcntl.flock(self.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self._is_in_place():
                raise BlockingIOError("it was renamed just now")
            if self.seek(0, io.SEEK_END) > file.num_bytes:
                self.restart()
            shared.report(file, self.tell())
        except BaseException:
            self.close()
            raise

    def _is_in_place(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self.fileno()), self.path.stat())
        except FileNotFoundError:
            return False

    def restart(self) -> None:
        """Empties it."""
        self.truncate(0)
        self.seek(0)

    def write(self, data: Any, /) -> int:
        """All of `data`. Raises ModelCorrupt beyond the end that the hub told."""
        self._shared.check()
        rest = memoryview(data)
        num_bytes = rest.nbytes
        if self.tell() + num_bytes > self._file.num_bytes:
            file = self._file
            raise ModelCorrupt(
                f"{file.name} of {file.model} is longer than the {file.num_bytes} bytes that the hub told."
            )
        with _writing(self.path.parent):
            while rest:
                rest = rest[super().write(rest) :]
        self._shared.report(self._file, self.tell())
        return num_bytes


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Names the folder when it cannot be written, be its disk full."""
    try:
        yield
    except OSError as error:
        raise ModelError(f"The model cache {folder} cannot be written: {error}.") from error
