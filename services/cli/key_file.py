"""The key of the port where `microserve up` takes programs, in a file that only this user can read."""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from services.cli.errors import CliError
from services.rpc.bind import split_address

# Where `up` listens, and nowhere else: by another name somebody else might, and would be shown the key.
HOST = "127.0.0.1"


def key_path(port: int) -> Path:
    """Where the key of the port is: below XDG_RUNTIME_DIR, else ~/.cache. CliError where there is neither."""
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    try:
        folder = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    except RuntimeError:
        raise CliError("there is no folder for the key of --admin-port: set HOME or XDG_RUNTIME_DIR") from None
    return folder / "microserve-keys" / f"admin-{port}.key"


@contextmanager
def new_key(port: int) -> Iterator[Path]:
    """Writes one that nobody had before; it is gone afterwards. CliError, also if another one is in use."""
    path = key_path(port)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _require_own(path.parent)
        # Not truncated yet: it may be another's, who is about to listen.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise CliError(f"cannot write {path}: {error.strerror or error}") from None
    with open(descriptor, "w") as file:
        if not _locked(file, path):
            raise CliError(f"another `microserve up` has --admin-port {port}")
        try:
            os.fchmod(file.fileno(), 0o600)
            file.truncate(0)
            file.write(secrets.token_urlsafe(32) + "\n")
            file.flush()
            yield path
        finally:
            # Before the lock goes, so that it is ours that goes.
            path.unlink(missing_ok=True)


def find_key(address: str) -> str:
    """The key of host:port if `up` of this user listens there, else the empty string."""
    host, port = split_address(address)
    if host != HOST:
        return ""
    try:
        return key_path(port).read_text().strip()
    except (OSError, CliError, UnicodeDecodeError):
        return ""


def _require_own(folder: Path) -> None:
    """Whoever can write the folder can put a key of their own there. OSError."""
    found = folder.stat()
    if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o022:
        raise PermissionError(f"others may write {folder}")


def _locked(file: TextIO, path: Path) -> bool:
    """Takes the file for as long as it is open; False if somebody has it, or had it and removed it just now."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False
