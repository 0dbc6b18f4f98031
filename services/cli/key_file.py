"""The key of the port where `microserve up` takes programs, in a file that only this user can read."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.cli.errors import CliError
from services.rpc.bind import LOOPBACK_HOSTS, split_address


def key_path(port: int) -> Path:
    """Where the key of the port is: below XDG_RUNTIME_DIR, else ~/.cache."""
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "microserve" / f"admin-{port}.key"


@contextmanager
def new_key(port: int) -> Iterator[Path]:
    """Writes one that nobody had before; it is gone afterwards. CliError."""
    path = key_path(port)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # of one that was killed
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
    except OSError as error:
        raise CliError(f"cannot write the key of --admin-port to {path}: {error.strerror}") from None
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def find_key(address: str) -> str:
    """The key of host:port if it is a port of this machine and this user's, else the empty string."""
    host, port = split_address(address)
    if host not in LOOPBACK_HOSTS:
        return ""
    try:
        return key_path(port).read_text().strip()
    except OSError:
        return ""
