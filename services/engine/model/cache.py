"""The user's cache of models: folders that appear whole or not at all, however many processes fill them."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from services.engine.model.errors import ModelError


def cache_root() -> Path:
    """microserve's part of the user's cache: under XDG_CACHE_HOME, else under ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "microserve"


def ensure_folder(
    target: Path,
    fill: Callable[[Path], None],
    on_wait: Callable[[], None] = lambda: None,
) -> None:
    """Makes `target` exist, calling fill(folder) on an empty folder beside it that is then renamed.

    A lock next to `target` lets one process work at a time; the others wait, after calling on_wait, as long as that
    one lives and works, and then find the folder there. What a killed process left is removed first, and what a
    failed one made is removed at once. Raises whatever `fill` raises, and ModelError for a full disk or a folder that
    cannot be written.
    """
    if target.is_dir():
        return
    try:
        _fill_alone(target, fill, on_wait)
    except OSError as error:
        raise ModelError(f"The model cache {target.parent} cannot be written: {error}.") from error


def _fill_alone(target: Path, fill: Callable[[Path], None], on_wait: Callable[[], None]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.unfinished")
    with locked(target.with_name(f".{target.name}.lock"), on_wait):
        if target.is_dir():
            return
        if unfinished.exists():
            shutil.rmtree(unfinished)
        unfinished.mkdir()
        try:
            fill(unfinished)
            unfinished.rename(target)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def locked(path: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Inside, no other process is in such a block of the same file, which stays; on_wait is called if one is."""
    with path.open("w") as lock:
        try:
            fcntl.flock(lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(lock.fileno(), fcntl.LOCK_EX)
        yield
