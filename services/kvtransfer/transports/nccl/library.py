"""libnccl by ctypes: where it is, whether it fits, and the calls that a pair of ranks needs.

The C interface is that of nccl.h; every function and constant used here is unchanged since NCCL 2.18.
"""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol

UNIQUE_ID_BYTES = 128
# ncclCommInitRankConfig with non-blocking communicators, and ncclCommAbort that works on them.
OLDEST_VERSION = (2, 18, 0)
# Blocks of a kernel that sends or receives; see buffers.py.
MAX_BLOCKS = 4
_FILE = "libnccl.so.2"
_BUILD = re.compile(rb"NCCL version (\d+)\.(\d+)\.(\d+)\+cuda(\d+)\.\d+")

_SUCCESS, _IN_PROGRESS = 0, 7
_UINT8 = 1
_UNDEFINED = -(2**31)
_MAGIC = 0xCAFEBEEF


class NcclMissing(Exception):
    """There is no NCCL that can be used here; the message is a clause for people."""


class NcclFailed(Exception):
    """A call failed; the communicator is good for nothing but abort."""


class CommunicatorState(Enum):
    """Whether what was asked of a communicator is done."""

    READY = "READY"
    IN_PROGRESS = "IN_PROGRESS"


@dataclass(frozen=True, slots=True)
class Build:
    """What a libnccl was built as: version (major, minor, patch) and major version of its CUDA."""

    version: tuple[int, int, int]
    cuda_major: int

    def __str__(self) -> str:
        return ".".join(map(str, self.version)) + f"+cuda{self.cuda_major}"


class Nccl(Protocol):
    """The library. A communicator is an opaque number; calls on it come from one thread and block nowhere."""

    def unique_id(self) -> bytes:
        """Names a communicator that is to be made; UNIQUE_ID_BYTES. Raises NcclFailed."""

    def init(self, unique_id: bytes, rank: int) -> int:
        """Begins to make rank 0 or 1 of a pair; returns the communicator. Raises NcclFailed."""

    def state(self, communicator: int) -> CommunicatorState:
        """How far it is. Raises NcclFailed if it went wrong, at the peer or here."""

    def group_start(self) -> None:
        """Calls until group_end belong together."""

    def group_end(self) -> None:
        """Queues them; `state` tells when that is done. Raises NcclFailed."""

    def send(self, communicator: int, address: int, num_bytes: int, stream: int) -> None:
        """Queues sending device memory to the other rank. Raises NcclFailed."""

    def receive(self, communicator: int, address: int, num_bytes: int, stream: int) -> None:
        """Queues receiving into device memory from the other rank. Raises NcclFailed."""

    def abort(self, communicator: int) -> None:
        """Ends it and what it has queued; it must not be named again. Raises NcclFailed."""


def find(setting: str) -> Path:
    """The library that `setting` names: a path, or `auto` for the one next to torch, else that of a nvidia-nccl wheel.

    Raises NcclMissing.
    """
    if setting != "auto":
        path = Path(setting)
        if not path.is_file():
            raise NcclMissing(f"{setting} is no file")
        return path
    # nvidia-nccl-cu12 and -cu13 install the same file: whichever came last.
    for package, folder in (("torch", "lib"), ("nvidia.nccl", "lib")):
        for root in _roots(package):
            if (root / folder / _FILE).is_file():
                return root / folder / _FILE
    raise NcclMissing(f"no {_FILE} next to torch, and neither nvidia-nccl-cu12 nor nvidia-nccl-cu13 is installed")


def read_build(path: Path) -> Build:
    """Reads the version out of the file, because the library itself does not tell its CUDA. Raises NcclMissing."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = _BUILD.search(content)
        # A match reads from the mapping, which ends here.
        numbers = [int(group) for group in found.groups()] if found is not None else []
    if not numbers:
        raise NcclMissing(f"{path} does not say which NCCL it is")
    major, minor, patch, cuda_major = numbers
    return Build((major, minor, patch), cuda_major)


def check_build(build: Build, driver_cuda_major: int) -> None:
    """Raises NcclMissing unless such a library works with a driver for that CUDA."""
    if build.version < OLDEST_VERSION:
        raise NcclMissing(f"NCCL {build} is older than {'.'.join(map(str, OLDEST_VERSION))}")
    if build.cuda_major > driver_cuda_major:
        raise NcclMissing(f"NCCL {build} needs a driver for CUDA {build.cuda_major}, not {driver_cuda_major}")


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_char * UNIQUE_ID_BYTES),)


class _Config(ctypes.Structure):
    """ncclConfig_t as of 2.17; libraries take every earlier form by its size and version."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
        ("cga_cluster_size", ctypes.c_int),
        ("min_ctas", ctypes.c_int),
        ("max_ctas", ctypes.c_int),
        ("net_name", ctypes.c_char_p),
        ("split_share", ctypes.c_int),
    )


def _non_blocking() -> _Config:
    undefined = _UNDEFINED
    return _Config(ctypes.sizeof(_Config), _MAGIC, 21700, 0, undefined, undefined, MAX_BLOCKS, None, undefined)


class NcclLibrary:
    """Nccl by the real library."""

    def __init__(self, path: Path) -> None:
        """Raises NcclMissing if it cannot be loaded or lacks a symbol."""
        communicator, stream, pointer = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p
        signatures: dict[str, tuple[object, ...]] = {
            "ncclGetVersion": (ctypes.POINTER(ctypes.c_int),),
            "ncclGetUniqueId": (ctypes.POINTER(_UniqueId),),
            "ncclCommInitRankConfig": (
                ctypes.POINTER(communicator),
                ctypes.c_int,
                _UniqueId,
                ctypes.c_int,
                ctypes.POINTER(_Config),
            ),
            "ncclCommGetAsyncError": (communicator, ctypes.POINTER(ctypes.c_int)),
            "ncclCommAbort": (communicator,),
            "ncclGroupStart": (),
            "ncclGroupEnd": (),
            "ncclSend": (pointer, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, communicator, stream),
            "ncclRecv": (pointer, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, communicator, stream),
            "ncclGetErrorString": (ctypes.c_int,),
        }
        try:
            self._library = ctypes.CDLL(str(path))
            for name, arguments in signatures.items():
                function = getattr(self._library, name)
                function.argtypes, function.restype = list(arguments), ctypes.c_int
        except (OSError, AttributeError) as error:
            raise NcclMissing(str(error)) from None
        self._library.ncclGetErrorString.restype = ctypes.c_char_p
        # Rank by communicator, to name the other one.
        self._ranks: dict[int, int] = {}

    def version(self) -> tuple[int, int, int]:
        """(major, minor, patch) as the library itself says."""
        code = ctypes.c_int()
        self._check("ncclGetVersion", self._library.ncclGetVersion(ctypes.byref(code)))
        return code.value // 10_000, code.value // 100 % 100, code.value % 100

    def unique_id(self) -> bytes:
        """See Nccl."""
        unique_id = _UniqueId()
        self._check("ncclGetUniqueId", self._library.ncclGetUniqueId(ctypes.byref(unique_id)))
        return ctypes.string_at(ctypes.byref(unique_id), UNIQUE_ID_BYTES)

    def init(self, unique_id: bytes, rank: int) -> int:
        """See Nccl."""
        communicator, config = ctypes.c_void_p(), _non_blocking()
        result = self._library.ncclCommInitRankConfig(
            ctypes.byref(communicator), 2, _UniqueId.from_buffer_copy(unique_id), rank, ctypes.byref(config)
        )
        self._check("ncclCommInitRankConfig", result)
        if communicator.value is None:
            raise NcclFailed("ncclCommInitRankConfig made no communicator")
        self._ranks[communicator.value] = rank
        return communicator.value

    def state(self, communicator: int) -> CommunicatorState:
        """See Nccl."""
        state = ctypes.c_int()
        self._check("ncclCommGetAsyncError", self._library.ncclCommGetAsyncError(communicator, ctypes.byref(state)))
        self._check("the communicator", state.value)
        return CommunicatorState.IN_PROGRESS if state.value == _IN_PROGRESS else CommunicatorState.READY

    def group_start(self) -> None:
        """See Nccl."""
        self._check("ncclGroupStart", self._library.ncclGroupStart())

    def group_end(self) -> None:
        """See Nccl."""
        self._check("ncclGroupEnd", self._library.ncclGroupEnd())

    def send(self, communicator: int, address: int, num_bytes: int, stream: int) -> None:
        """See Nccl."""
        peer = 1 - self._ranks[communicator]
        self._check("ncclSend", self._library.ncclSend(address, num_bytes, _UINT8, peer, communicator, stream))

    def receive(self, communicator: int, address: int, num_bytes: int, stream: int) -> None:
        """See Nccl."""
        peer = 1 - self._ranks[communicator]
        self._check("ncclRecv", self._library.ncclRecv(address, num_bytes, _UINT8, peer, communicator, stream))

    def abort(self, communicator: int) -> None:
        """See Nccl."""
        del self._ranks[communicator]
        self._check("ncclCommAbort", self._library.ncclCommAbort(communicator))

    def _check(self, name: str, result: int) -> None:
        if result not in (_SUCCESS, _IN_PROGRESS):
            raise NcclFailed(f"{name}: {self._library.ncclGetErrorString(result).decode()}")


def _roots(package: str) -> list[Path]:
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        return []
    return [Path(place) for place in (spec.submodule_search_locations or ())] if spec is not None else []
