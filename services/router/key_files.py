"""Keys in files, which may be replaced while the router runs.

They are looked at every second, beside the requests, which use what was found last. A file that cannot be used
changes nothing: the keys that it had before stay, so that there is never a moment in which no key is asked for.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TypeAlias

from services.router.asking import MAX_NAME_CHARACTERS
from services.router.keys import fingerprint, is_key
from services.rpc.errors import StartError
from services.rpc.reloaded import Reloaded

# Enough for ten thousand tenants, and read in about a tenth of a second.
MAX_FILE_CHARACTERS = 1 << 20
LOOK_S = 1.0
# A file that has been seen unchanged for so long is whole.
REST_S = 1.0


# Tenants by fingerprints.
KeysInFile: TypeAlias = "Reloaded[Mapping[bytes, str]]"


def tenants_of(path: Path, others: Collection[str]) -> KeysInFile:
    """Tenants by fingerprints of their keys, as the file of lines TENANT KEY says them now. None may be one of the
    `others`. StartError if it cannot be used to begin with."""

    def read() -> Mapping[bytes, str]:
        tenants = read_tenant_keys(path)
        if tenants.keys() & set(others):
            raise StartError(f"a key in {path} is one of --api-key or --admin-key too")
        return {fingerprint(key): tenant for key, tenant in tenants.items()}

    return _reloaded(path, read)


def key_of(path: Path) -> KeysInFile:
    """The fingerprint of the one key that the file holds now, which is no tenant's. StartError as tenants_of."""
    return _reloaded(path, lambda: {fingerprint(read_key(path)): ""})


def read_key(path: Path) -> str:
    """The key in a file, which may end with a newline. StartError."""
    text = _text(path).removesuffix("\n")
    if not is_key(text):
        raise StartError(f"the key in {path} must be one line of printable ASCII with no space around it")
    return text


def read_tenant_keys(path: Path) -> dict[str, str]:
    """Tenants by their keys, from a file of lines TENANT KEY. Lines that are blank or begin with # count for nothing.
    StartError, also if it has no other: without any key all may call."""
    tenants: dict[str, str] = {}
    # Not splitlines(), for which a line also ends where no editor shows it: a comment's rest would be a key.
    for number, line in enumerate(_text(path).split("\n"), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 2 or not all(map(is_key, words)):  # headers carry both
            raise StartError(f"line {number} of {path} must be a tenant and a key of printable ASCII")
        tenant, key = words
        if len(tenant) > MAX_NAME_CHARACTERS:
            raise StartError(f"the tenant in line {number} of {path} must have 1 to {MAX_NAME_CHARACTERS} characters")
        if key in tenants:
            raise StartError(f"the key in line {number} of {path} stands there before")
        tenants[key] = tenant
    if not tenants:
        raise StartError(f"{path} has no line with a tenant and a key")
    return tenants


def _reloaded(path: Path, read: Callable[[], Mapping[bytes, str]]) -> KeysInFile:
    return Reloaded([path], read, what="keys", rest_s=REST_S)


def _text(path: Path) -> str:
    try:
        # Some editors begin a file with a mark of its encoding.
        with open(path, encoding="utf-8-sig", opener=_open) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise StartError(f"{path} is no regular file")
            text = file.read(MAX_FILE_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise StartError(f"cannot read the key in {path}: {getattr(error, 'strerror', None) or error}") from None
    if len(text) > MAX_FILE_CHARACTERS:
        raise StartError(f"{path} has more than {MAX_FILE_CHARACTERS} characters")
    return text


def _open(path: str, flags: int) -> int:
    """Of a pipe that nobody writes it returns too."""
    return os.open(path, flags | os.O_NONBLOCK)
