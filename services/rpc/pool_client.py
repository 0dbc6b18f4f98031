"""An engine's hold on its page pool: memory shared with the KV transfer service of its node.

The service makes the pool and passes three descriptors over a unix socket: the pages, a control page with ready
counters, and an eventfd. The engine counts as alive for as long as that socket stays open. Both sides map the same
memory, so the engine's death takes nothing from the service and the service's death takes nothing from the engine:
`adopt` hands the descriptors to the service's next incarnation.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import struct
import threading
import weakref
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.rpc.cuda_driver import CudaDriver, CudaFailed
from services.rpc.cuda_memory import DeviceSegment
from services.rpc.fd_passing import (
    FdPassingError,
    Message,
    close_descriptors,
    receive_message,
    send_message,
    to_address,
)

# A ready counter has a cache line of its own.
SLOT_BYTES = 64
_BLOCK_BYTES = 512  # the unit of st_blocks
_ANSWER_TIMEOUT_S = 10.0

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_MAP_FAILED = ctypes.c_void_p(-1).value


class PoolAttachError(Exception):
    """The pool could not be attached: ticket refused, service gone or too slow, or no memory to map."""


@dataclass(frozen=True, slots=True)
class Handover:
    """The service's answer to a ticket. Descriptors travel with it except when the engine brought its own."""

    pool_bytes: int
    slot_count: int
    # Sixteen bytes that name the GPU whose memory the pool is in; empty: host memory.
    gpu: bytes = b""

    _WIRE = struct.Struct("!4sQQ16s")
    _MAGIC = b"MSP2"

    def encode(self) -> bytes:
        """The bytes on the socket."""
        return self._WIRE.pack(self._MAGIC, self.pool_bytes, self.slot_count, self.gpu)

    @classmethod
    def decode(cls, payload: bytes) -> Handover:
        """Reads the answer. Raises PoolAttachError if it is none, for instance one of another version."""
        if len(payload) != cls._WIRE.size or payload[:4] != cls._MAGIC:
            raise PoolAttachError("the transfer service speaks another handover version")
        _, pool_bytes, slot_count, gpu = cls._WIRE.unpack(payload)
        return cls(pool_bytes, slot_count, gpu if any(gpu) else b"")


def map_shared(descriptor: int, size_bytes: int, *, prefault: bool) -> NDArray[np.uint8]:
    """Maps shared memory for reading and writing, (size_bytes,). It stays mapped until the last view of it goes.

    Not through Python's mmap: that keeps a second descriptor open, holds the GIL while it takes the page faults that
    `prefault` pays for (a tenth of a second for each GiB), and unmaps under a tensor without a warning. Raises OSError
    if it cannot be mapped.
    """
    flags = mmap.MAP_SHARED | (mmap.MAP_POPULATE if prefault else 0)
    address = _LIBC.mmap(None, size_bytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, descriptor, 0)
    if address == _MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    block = (ctypes.c_uint8 * size_bytes).from_address(address)
    # At exit the kernel unmaps, after whoever may still hold a view.
    weakref.finalize(block, _LIBC.munmap, address, size_bytes).atexit = False
    return np.ctypeslib.as_array(block)


def is_allocated(descriptor: int, size_bytes: int) -> bool:
    """Whether a pool's memory is there already, so that faults taken now are spared later. What the service has not
    allocated is not to be asked for by who maps it."""
    return os.fstat(descriptor).st_blocks * _BLOCK_BYTES >= size_bytes


def slot_view(control: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """The ready counters in a control page, (slot_count,)."""
    return control.view(np.uint64)[:: SLOT_BYTES // 8]


class AttachedPool:
    """A mapped pool.

    `memory` holds the pages as bytes, (pool_bytes,), if it is host memory; else it is empty and `device` maps them on
    the GPU. `control` holds the ready counters, (slot_count,). `connection` ends when the service dies: it becomes
    readable then.
    """

    def __init__(
        self,
        connection: socket.socket,
        handover: Handover,
        message: Message,
        gpu: CudaDriver | None,
    ) -> None:
        """Raises PoolAttachError if the pool is in the memory of another GPU than `gpu`."""
        self.connection = connection
        self.handover = handover
        self._pool_descriptor, self._control_descriptor, self.ready_eventfd = message.descriptors
        if handover.gpu != (gpu.uuid if gpu is not None else b""):
            raise PoolAttachError("the pool is in other memory than was asked for")
        control_bytes = handover.slot_count * SLOT_BYTES
        self.control = slot_view(map_shared(self._control_descriptor, control_bytes, prefault=True))
        self.device: DeviceSegment | None = None
        self.memory = np.empty(0, np.uint8)
        if gpu is None:
            prefault = is_allocated(self._pool_descriptor, handover.pool_bytes)
            self.memory = map_shared(self._pool_descriptor, handover.pool_bytes, prefault=prefault)
        else:
            # Last, because nobody would unmap it if what follows failed. A descriptor of its own: the pool's stays for
            # the service's next incarnation.
            self.device = DeviceSegment.adopt(gpu, os.dup(self._pool_descriptor), handover.pool_bytes)
        self._order = threading.Lock()

    @property
    def descriptors(self) -> tuple[int, int, int]:
        """Pages, control page and eventfd, in the order they are passed."""
        return self._pool_descriptor, self._control_descriptor, self.ready_eventfd

    def raise_ready(self, slot: int, layers: int) -> None:
        """Tells the service that the first `layers` layers of the range are written; 0 before a Push that uses the slot
        again. Any thread; never blocks."""
        # Where the processor reorders stores, the release of the first lock and the acquisition of the second keep the
        # pages' stores before the counter's.
        with self._order:
            pass
        with self._order:
            self.control[slot] = layers
        os.eventfd_write(self.ready_eventfd, 1)

    def service_is_gone(self) -> bool:
        """Whether the service closed its end; never blocks."""
        try:
            return self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        """Lets go of the pool and tells the service that the engine is gone. Again is no error.

        Nobody may write through views that are left: the service may give the pool to another engine.
        """
        self.memory = np.empty(0, np.uint8)
        self.control = np.empty(0, np.uint64)
        if self.device is not None:
            self.device.close()
        if self.connection.fileno() >= 0:
            close_descriptors(self.descriptors)
        self.connection.close()


def attach_pool(
    socket_path: str, ticket: bytes, gpu: CudaDriver | None = None, *, timeout_s: float = _ANSWER_TIMEOUT_S
) -> AttachedPool:
    """Fetches and maps the pool that AttachPool named, on `gpu` or in host memory. Blocks, at most `timeout_s` for the
    service's answer.

    Raises PoolAttachError; nothing is left open then.
    """
    connection, handover, message = _present(socket_path, ticket, (), timeout_s)
    try:
        if len(message.descriptors) != 3:
            raise PoolAttachError(f"expected 3 descriptors, got {len(message.descriptors)}")
        return AttachedPool(connection, handover, message, gpu)
    except (PoolAttachError, CudaFailed, OSError, ValueError) as error:
        message.close()
        connection.close()
        raise PoolAttachError(f"cannot map the pool: {error}") from error


def adopt(pool: AttachedPool, socket_path: str, ticket: bytes) -> None:
    """Hands a mapped pool to a new incarnation of the service, which asked for it by CreatePool(adopt).

    The memory and everything in it stay as they are; only `pool.connection` is new. Raises PoolAttachError, and then
    the pool is still mapped and still without a service.
    """
    connection, handover, message = _present(socket_path, ticket, pool.descriptors, _ANSWER_TIMEOUT_S)
    message.close()
    if handover != pool.handover:
        connection.close()
        raise PoolAttachError("the transfer service took the pool for one of another size")
    pool.connection.close()
    pool.connection = connection


def _present(
    socket_path: str, ticket: bytes, descriptors: tuple[int, ...], timeout_s: float
) -> tuple[socket.socket, Handover, Message]:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.settimeout(timeout_s)
        connection.connect(to_address(socket_path))
        send_message(connection, ticket, descriptors)
        message = receive_message(connection)
    except (OSError, FdPassingError) as error:
        connection.close()
        raise PoolAttachError(f"the transfer service refused the ticket or is gone: {error}") from error
    try:
        handover = Handover.decode(message.payload)
    except PoolAttachError:
        message.close()
        connection.close()
        raise
    connection.settimeout(None)
    return connection, handover, message
