"""libcuda without a GPU: device memory is memfds, mapped by every process that has the descriptor.

Calls are noted in their order. What real drivers refuse and these tests need refused is refused: memory mapped twice,
released twice or used without access, and calls without a context. What is queued on a stream happens as late as can
be, when somebody asks for its end; a kernel that reaches for what is not there breaks everything from then on.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.kvtransfer.cuda.ptx import Ptx

_LIBC = ctypes.CDLL(None)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_MAP_FIXED = 0x10

GRANULARITY = 4096
UUID = bytes(range(1, 17))
INVALID_VALUE, OUT_OF_MEMORY, NO_DEVICE, NOT_READY, ILLEGAL_ADDRESS = 1, 2, 100, 600, 700


class IllegalAddress(Exception):
    """A kernel reached for what is not there."""


def _value(argument: Any) -> int:
    return int(argument.value if hasattr(argument, "value") else argument)


def _memory(size: int, places: dict[int, NDArray[np.uint8]]) -> int:
    """Address of new memory, aligned as the driver's is; kept in `places`."""
    memory = np.zeros(size + 256, np.uint8)
    begin = -memory.ctypes.data % 256
    places[memory.ctypes.data + begin] = memory[begin : begin + size]
    return memory.ctypes.data + begin


class FakeLibcuda:
    """One GPU of number 0. `failing` names calls that return an error; `busy` streams are never idle; copies within
    the GPU are `altered` by a bit each."""

    def __init__(self, *, memory_bytes: int = 1 << 30) -> None:
        self.log: list[str] = []
        self.failing: dict[str, int] = {}
        self.busy = False
        self.altered = False
        self.shares_memory = True
        # Set when somebody asks for a stream's state.
        self.asked = threading.Event()
        # Set when somebody waits for a stream, and what that waits for.
        self.waited_for, self.may_end = threading.Event(), threading.Event()
        self.may_end.set()
        self._left_bytes = memory_bytes
        # Descriptor by handle; sizes by address; addresses that may be read and written.
        self._handles: dict[int, int] = {}
        self._reserved: dict[int, int] = {}
        self._mapped: dict[int, int] = {}
        self._accessible: set[int] = set()
        self._allocated: dict[int, NDArray[np.uint8]] = {}
        self._pinned: dict[int, NDArray[np.uint8]] = {}
        self._modules: dict[int, Ptx] = {}
        self._queued: dict[int, list[Callable[[], object]]] = {}
        # The error of every call, once the context is broken.
        self._broken = 0
        self._next = 1
        self._current = threading.local()

    def __getattr__(self, name: str) -> Any:
        call = type(self).__dict__[f"do_{name}"]

        def noted(*arguments: Any) -> int:
            self.log.append(name)
            if name in self.failing:
                return self.failing[name]
            if self._broken and name != "cuGetErrorString":
                return self._broken
            if name not in ("cuInit", "cuCtxSetCurrent", "cuGetErrorString", "cuDriverGetVersion") and (
                not name.startswith("cuDevice") and not getattr(self._current, "is_set", False)
            ):
                return INVALID_VALUE
            return int(call(self, *arguments) or 0)

        return noted

    @property
    def mapped(self) -> int:
        """Mappings that exist."""
        return len(self._mapped)

    @property
    def handles(self) -> int:
        """Allocations that are named by a handle."""
        return len(self._handles)

    @property
    def allocations(self) -> tuple[int, int]:
        """Allocations of this process on the GPU, and of pinned host memory."""
        return len(self._allocated), len(self._pinned)

    def memory(self, address: int) -> NDArray[np.uint8]:
        """What an address of cuMemAlloc stands for."""
        return self._allocated[address]

    def do_cuInit(self, flags: int) -> None: ...

    def do_cuDriverGetVersion(self, version: Any) -> None:
        version._obj.value = 13_000

    def do_cuDeviceGet(self, device: Any, ordinal: int) -> int:
        device._obj.value = ordinal
        return NO_DEVICE if ordinal else 0

    def do_cuDeviceGetUuid_v2(self, uuid: Any, device: int) -> None:
        uuid.raw = UUID

    def do_cuDeviceGetAttribute(self, value: Any, attribute: int, device: int) -> None:
        value._obj.value = attribute in (102, 103) and self.shares_memory

    def do_cuDevicePrimaryCtxRetain(self, context: Any, device: int) -> None:
        context._obj.value = 77

    def do_cuCtxSetCurrent(self, context: Any) -> None:
        assert _value(context) == 77
        self._current.is_set = True

    def do_cuGetErrorString(self, error: int, text: Any) -> None:
        text._obj.value = f"fake error {error}".encode()

    def do_cuStreamCreate(self, stream: Any, flags: int) -> None:
        assert flags == 1, "a stream that waits for the default stream stalls the engine"
        stream._obj.value = self._new()

    def do_cuStreamDestroy_v2(self, stream: int) -> int:
        return self._finish(stream)

    def do_cuStreamQuery(self, stream: int) -> int:
        self.asked.set()
        return NOT_READY if self.busy else self._finish(stream)

    def do_cuStreamSynchronize(self, stream: int) -> int:
        self.waited_for.set()
        assert self.may_end.wait(60)
        return self._finish(stream)

    def do_cuMemcpyDtoDAsync_v2(self, target: int, source: int, num_bytes: int, stream: int) -> int:
        if not (self._reachable(target, num_bytes) and self._reachable(source, num_bytes)):
            return INVALID_VALUE

        def copy() -> None:
            ctypes.memmove(target, source, num_bytes)
            if self.altered:
                ctypes.memset(target, ctypes.string_at(target, 1)[0] ^ 1, 1)

        return self._queue(stream, copy)

    def do_cuMemcpyDtoHAsync_v2(self, target: int, source: int, num_bytes: int, stream: int) -> int:
        if not (self._reachable(source, num_bytes) and self._is_pinned(target, num_bytes)):
            return INVALID_VALUE
        return self._queue(stream, lambda: ctypes.memmove(target, source, num_bytes))

    def do_cuMemHostAlloc(self, address: Any, size: int, flags: int) -> None:
        address._obj.value = _memory(size, self._pinned)

    def do_cuMemGetAllocationGranularity(self, granularity: Any, properties: Any, option: int) -> None:
        self._check(properties._obj)
        granularity._obj.value = GRANULARITY

    def do_cuMemCreate(self, handle: Any, size: int, properties: Any, flags: int) -> int:
        self._check(properties._obj)
        if size % GRANULARITY:
            return INVALID_VALUE
        if size > self._left_bytes:
            return OUT_OF_MEMORY
        descriptor = os.memfd_create("fake-gpu", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, size)
        handle._obj.value = self._new()
        self._handles[handle._obj.value] = descriptor
        return 0

    def do_cuMemRelease(self, handle: Any) -> None:
        os.close(self._handles.pop(_value(handle)))

    def do_cuMemExportToShareableHandle(self, descriptor: Any, handle: Any, kind: int, flags: int) -> None:
        assert kind == 1
        descriptor._obj.value = os.dup(self._handles[_value(handle)])

    def do_cuMemImportFromShareableHandle(self, handle: Any, descriptor: int, kind: int) -> int:
        assert kind == 1
        if not os.readlink(f"/proc/self/fd/{descriptor}").startswith("/memfd:fake-gpu"):
            return INVALID_VALUE
        handle._obj.value = self._new()
        self._handles[handle._obj.value] = os.dup(descriptor)
        return 0

    def do_cuMemAddressReserve(self, address: Any, size: int, alignment: int, at: int, flags: int) -> None:
        address._obj.value = _LIBC.mmap(None, size, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        self._reserved[address._obj.value] = size

    def do_cuMemAddressFree(self, address: int, size: int) -> None:
        assert address not in self._mapped
        assert self._reserved.pop(address) == size
        _LIBC.munmap(address, size)

    def do_cuMemMap(self, address: int, size: int, offset: int, handle: Any, flags: int) -> int:
        assert self._reserved[address] == size
        assert address not in self._mapped
        descriptor = self._handles[_value(handle)]
        if os.fstat(descriptor).st_size != size:
            return INVALID_VALUE
        access = mmap.PROT_READ | mmap.PROT_WRITE
        _LIBC.mmap(address, size, access, mmap.MAP_SHARED | _MAP_FIXED, descriptor, 0)
        self._mapped[address] = size
        return 0

    def do_cuMemcpyHtoDAsync_v2(self, target: int, source: int, num_bytes: int, stream: int) -> int:
        if not (self._reachable(target, num_bytes) and self._is_pinned(source, num_bytes)):
            return INVALID_VALUE
        return self._queue(stream, lambda: ctypes.memmove(target, source, num_bytes))

    def do_cuMemFreeHost(self, address: int) -> None:
        assert not any(self._queued.values())
        del self._pinned[address]

    def do_cuMemFree_v2(self, address: int) -> None:
        assert not any(self._queued.values())
        del self._allocated[address]

    def do_cuModuleLoadData(self, module: Any, image: bytes) -> None:
        module._obj.value = self._new()
        self._modules[module._obj.value] = Ptx(image.decode())

    def do_cuModuleGetFunction(self, function: Any, module: Any, name: bytes) -> None:
        assert self._modules[module.value].name == name.decode()
        function._obj.value = module.value

    def do_cuLaunchKernel(self, function: Any, *arguments: Any) -> int:
        blocks, grid_y, grid_z, threads, block_y, block_z, shared_bytes, stream, places, extra = arguments
        assert (grid_y, grid_z, block_y, block_z, shared_bytes, extra) == (1, 1, 1, 1, 0, None)
        values = [ctypes.c_uint64.from_address(place).value for place in places]
        kernel = self._modules[function.value]
        return self._queue(stream, lambda: kernel.run(values, blocks, threads, self))

    def load(self, address: int, num_bytes: int) -> bytes:
        """For kernels. Raises IllegalAddress."""
        if not self._reachable(address, num_bytes):
            raise IllegalAddress
        return ctypes.string_at(address, num_bytes)

    def store(self, address: int, data: bytes) -> None:
        """For kernels. Raises IllegalAddress."""
        if not self._reachable(address, len(data)):
            raise IllegalAddress
        if self.altered:
            data = bytes([data[0] ^ 1]) + data[1:]
        ctypes.memmove(address, data, len(data))

    def do_cuMemAlloc_v2(self, address: Any, size: int) -> None:
        address._obj.value = _memory(size, self._allocated)

    def do_cuMemSetAccess(self, address: int, size: int, access: Any, count: int) -> None:
        assert (access._obj.location.type, access._obj.location.id, access._obj.flags, count) == (1, 0, 3, 1)
        self._accessible.add(address)

    def do_cuMemUnmap(self, address: int, size: int) -> None:
        assert not any(self._queued.values()), "unmapping under a copy breaks the context"
        assert self._mapped.pop(address) == size
        self._accessible.discard(address)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
        _LIBC.mmap(address, size, 0, flags, -1, 0)

    def _check(self, properties: Any) -> None:
        found = (properties.type, properties.handle_types, properties.location.type, properties.location.id)
        assert found == (1, 1, 1, 0)

    def _reachable(self, address: int, num_bytes: int) -> bool:
        places = [(begin, self._mapped[begin]) for begin in self._accessible]
        places += [(begin, memory.nbytes) for begin, memory in self._allocated.items()]
        return any(begin <= address and address + num_bytes <= begin + size for begin, size in places)

    def _queue(self, stream: int, work: Callable[[], object]) -> int:
        self._queued.setdefault(stream, []).append(work)
        return 0

    def _finish(self, stream: int) -> int:
        """What is queued happens."""
        queued = self._queued.get(stream, [])
        try:
            while queued:
                queued.pop(0)()
        except IllegalAddress:
            self._broken = ILLEGAL_ADDRESS
        return self._broken

    def _is_pinned(self, address: int, num_bytes: int) -> bool:
        places = self._pinned.items()
        return any(begin <= address and address + num_bytes <= begin + memory.nbytes for begin, memory in places)

    def _new(self) -> int:
        self._next += 1
        return self._next
