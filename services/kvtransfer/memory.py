"""Sealed shared memory: nobody can truncate it under the other side."""

from __future__ import annotations

import errno
import fcntl
import os

import numpy as np
from numpy.typing import NDArray

from services.kvtransfer.errors import InvalidPool, NoMemory
from services.rpc.pool_client import map_shared

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def cannot_give(what: str, error: OSError) -> NoMemory:
    """The error for something that the kernel refused."""
    return NoMemory(f"the machine cannot give {what}: {error.strerror}")


class SharedSegment:
    """One memfd of fixed size, mapped. `array` shows its bytes, (size_bytes,), until `close`."""

    def __init__(self, descriptor: int, size_bytes: int, *, prefault: bool) -> None:
        """Takes the descriptor over. Raises OSError if it cannot be mapped; the caller closes it then."""
        self.array: NDArray[np.uint8] = map_shared(descriptor, size_bytes, prefault=prefault)
        self.descriptor = descriptor
        self.size_bytes = size_bytes

    @classmethod
    def create(cls, name: str, size_bytes: int, *, prefault: bool) -> SharedSegment:
        """New zeroed memory that /proc shows under `name`. Blocks for as long as the kernel takes to find it.

        Raises NoMemory.
        """
        try:
            descriptor = os.memfd_create(name, os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        except OSError as error:
            raise cannot_give("a descriptor", error) from error
        try:
            os.ftruncate(descriptor, size_bytes)
            if prefault:
                os.posix_fallocate(descriptor, 0, size_bytes)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
            return cls(descriptor, size_bytes, prefault=prefault)
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.ENOMEM, errno.ENOSPC, errno.EFBIG):
                raise cannot_give(f"{size_bytes} bytes", error) from error
            raise

    @classmethod
    def adopt(cls, descriptor: int, size_bytes: int) -> SharedSegment:
        """Memory that an earlier incarnation made. Takes the descriptor over, also when it raises InvalidPool."""
        try:
            if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
                raise InvalidPool("the descriptor handed back is not sealed")
            if os.fstat(descriptor).st_size != size_bytes:
                raise InvalidPool(f"the memory handed back does not have {size_bytes} bytes")
            return cls(descriptor, size_bytes, prefault=False)
        except (OSError, InvalidPool) as error:
            os.close(descriptor)
            if isinstance(error, InvalidPool):
                raise
            raise InvalidPool("the descriptor handed back is no shared memory") from error

    def close(self) -> None:
        """Lets go of the memory, which is freed when no view of it is left and no engine maps it. Again is no error."""
        if self.descriptor >= 0:
            self.array = np.empty(0, np.uint8)
            os.close(self.descriptor)
            self.descriptor = -1
