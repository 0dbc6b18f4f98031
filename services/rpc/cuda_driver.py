"""The CUDA driver (libcuda.so.1) by ctypes, for pools in the memory of a GPU and for what moves them.

The interface is that of cuda.h, unchanged in these calls since CUDA 11.4. No CUDA toolkit or wheel is needed.
"""

from __future__ import annotations

import ctypes
from typing import Any

_FILE = "libcuda.so.1"
_NOT_READY = 600
_PINNED, _POSIX_DESCRIPTOR, _ON_DEVICE, _READ_WRITE = 1, 1, 1, 3

# Mapping memory at chosen addresses, and passing it on as POSIX descriptors: some virtual GPUs do not.
_NEEDED_ATTRIBUTES = (102, 103)

_UINT, _SIZE, _POINTER = ctypes.c_uint, ctypes.c_size_t, ctypes.c_void_p
_ADDRESS, _HANDLE = ctypes.c_uint64, ctypes.c_uint64


class CudaMissing(Exception):
    """There is no CUDA driver or no GPU to use; the message is a clause for people."""


class CudaFailed(Exception):
    """The driver refused a call."""


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class AllocationProperties(ctypes.Structure):
    """CUmemAllocationProp. The last eight bytes are allocFlags, all off."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("win32_metadata", _POINTER),
        ("flags", ctypes.c_ubyte * 8),
    )


class Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


def _to(kind: Any) -> Any:
    return ctypes.POINTER(kind)


_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (_UINT,),
    "cuDriverGetVersion": (_to(ctypes.c_int),),
    "cuDeviceGet": (_to(ctypes.c_int), ctypes.c_int),
    "cuDeviceGetUuid_v2": (_to(ctypes.c_char), ctypes.c_int),
    "cuDeviceGetAttribute": (_to(ctypes.c_int), ctypes.c_int, ctypes.c_int),
    "cuDevicePrimaryCtxRetain": (_to(_POINTER), ctypes.c_int),
    "cuCtxSetCurrent": (_POINTER,),
    "cuStreamCreate": (_to(_POINTER), _UINT),
    "cuStreamDestroy_v2": (_POINTER,),
    "cuStreamQuery": (_POINTER,),
    "cuStreamSynchronize": (_POINTER,),
    "cuMemcpyDtoDAsync_v2": (_ADDRESS, _ADDRESS, _SIZE, _POINTER),
    "cuMemcpyDtoHAsync_v2": (_POINTER, _ADDRESS, _SIZE, _POINTER),
    "cuMemcpyHtoDAsync_v2": (_ADDRESS, _POINTER, _SIZE, _POINTER),
    "cuMemHostAlloc": (_to(_POINTER), _SIZE, _UINT),
    "cuMemFreeHost": (_POINTER,),
    "cuModuleLoadData": (_to(_POINTER), ctypes.c_char_p),
    "cuModuleGetFunction": (_to(_POINTER), _POINTER, ctypes.c_char_p),
    "cuLaunchKernel": (_POINTER, *(_UINT,) * 7, _POINTER, _to(_POINTER), _to(_POINTER)),
    "cuMemAlloc_v2": (_to(_ADDRESS), _SIZE),
    "cuMemFree_v2": (_ADDRESS,),
    "cuMemGetAllocationGranularity": (_to(_SIZE), _to(AllocationProperties), ctypes.c_int),
    "cuMemCreate": (_to(_HANDLE), _SIZE, _to(AllocationProperties), ctypes.c_ulonglong),
    "cuMemRelease": (_HANDLE,),
    "cuMemExportToShareableHandle": (_to(ctypes.c_int), _HANDLE, ctypes.c_int, ctypes.c_ulonglong),
    "cuMemImportFromShareableHandle": (_to(_HANDLE), _POINTER, ctypes.c_int),
    "cuMemAddressReserve": (_to(_ADDRESS), _SIZE, _SIZE, _ADDRESS, ctypes.c_ulonglong),
    "cuMemAddressFree": (_ADDRESS, _SIZE),
    "cuMemMap": (_ADDRESS, _SIZE, _SIZE, _HANDLE, ctypes.c_ulonglong),
    "cuMemUnmap": (_ADDRESS, _SIZE),
    "cuMemSetAccess": (_ADDRESS, _SIZE, _to(Access), _SIZE),
    "cuGetErrorString": (ctypes.c_int, _to(ctypes.c_char_p)),
}


class CudaDriver:
    """One GPU of this process, in its primary context, which torch uses too. Any thread."""

    def __init__(self, ordinal: int, library: Any = None) -> None:
        """`library`: libcuda, or what stands for it. Raises CudaMissing."""
        try:
            self._library = library if library is not None else _load()
            self._context: Any = None
            self.call("cuInit", 0)
            version, device, context = ctypes.c_int(), ctypes.c_int(), _POINTER()
            uuid = (ctypes.c_char * 16)()
            self.call("cuDriverGetVersion", ctypes.byref(version))
            self.call("cuDeviceGet", ctypes.byref(device), ordinal)
            self.call("cuDeviceGetUuid_v2", uuid, device.value)
            for attribute in _NEEDED_ATTRIBUTES:
                has = ctypes.c_int()
                self.call("cuDeviceGetAttribute", ctypes.byref(has), attribute, device.value)
                if not has.value:
                    raise CudaMissing("the GPU cannot share its memory with other processes by descriptors")
            self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device.value)
        except CudaFailed as error:
            raise CudaMissing(str(error)) from None
        self._context = context
        self.ordinal = ordinal
        self.cuda_major = version.value // 1000
        # Sixteen bytes that name the GPU in every process, whatever number it has there.
        self.uuid = bytes(uuid)

    def call(self, name: str, *arguments: Any) -> None:
        """Calls a function in the GPU's context. Raises CudaFailed."""
        if self._context is not None:
            # Threads begin without one.
            self._check("cuCtxSetCurrent", self._library.cuCtxSetCurrent(self._context))
        self._check(name, getattr(self._library, name)(*arguments))

    def is_idle(self, stream: int) -> bool:
        """Whether everything queued on a stream has ended. Raises CudaFailed if some of it failed."""
        self._check("cuCtxSetCurrent", self._library.cuCtxSetCurrent(self._context))
        result = self._library.cuStreamQuery(stream)
        if result != _NOT_READY:
            self._check("cuStreamQuery", result)
        return bool(result != _NOT_READY)

    def pinned_memory(self) -> AllocationProperties:
        """What memory of this GPU is to be that other processes can map by a descriptor."""
        return AllocationProperties(_PINNED, _POSIX_DESCRIPTOR, _Location(_ON_DEVICE, self.ordinal))

    def full_access(self) -> Access:
        """Reading and writing by this GPU."""
        return Access(_Location(_ON_DEVICE, self.ordinal), _READ_WRITE)

    def _check(self, name: str, result: int) -> None:
        if result == 0:
            return
        text = ctypes.c_char_p()
        self._library.cuGetErrorString(result, ctypes.byref(text))
        raise CudaFailed(f"{name}: {text.value.decode() if text.value else f'error {result}'}")


def _load() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(_FILE)
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = list(arguments), ctypes.c_int
    except (OSError, AttributeError) as error:
        raise CudaMissing(f"no usable CUDA driver: {error}") from None
    return library
