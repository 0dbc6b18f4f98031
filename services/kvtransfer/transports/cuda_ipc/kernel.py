"""The kernel that copies any number of runs in one launch: PTX, which the driver compiles for its GPU.

Written by hand because the service has neither torch nor a compiler. Where both ends of a tile are aligned it moves
sixteen bytes an instruction, four of them under way a thread; what is behind the last sixteen, or not aligned, byte by
byte. `kernel_trial.py` holds it equal to the driver's own copies at every start.
"""

from __future__ import annotations

import ctypes

import numpy as np

from services.kvtransfer.transports.cuda_ipc.device import Device, Stream
from services.kvtransfer.transports.cuda_ipc.runs import RunList
from services.rpc.cuda_driver import CudaDriver

_THREADS = 256
_ROW_BYTES = 24
# Tiles of one launch: 128 MiB of whole pages. A longer list takes several.
MAX_TILES = 8192

PTX = """\
.version 7.0                                // of CUDA 11.0, the first that knows sm_80
.target sm_80                               // compiled for this one and every later one
.address_size 64

.visible .entry copy_runs(                  // one block for each row of the list
    .param .u64 list,                       // address of the rows: three numbers of eight bytes each
    .param .u64 target,                     // what the first number of a row is added to
    .param .u64 source                      // what the second one is added to; the third one is bytes
)
{
    .reg .pred %p;
    .reg .u32 %block, %thread, %threads;
    .reg .u32 %a0, %a1, %a2, %a3, %b0, %b1, %b2, %b3, %c0, %c1, %c2, %c3, %d0, %d1, %d2, %d3;
    .reg .u64 %row, %to, %from, %bytes, %offset, %bits, %whole, %at, %step, %last;
    .reg .u64 %from0, %from1, %from2, %from3, %to0, %to1, %to2, %to3;

    mov.u32 %block, %ctaid.x;               // which row
    mov.u32 %thread, %tid.x;                // which thread of the block
    mov.u32 %threads, %ntid.x;              // of how many
    ld.param.u64 %row, [list];
    mad.wide.u32 %row, %block, 24, %row;    // address of the row
    ld.param.u64 %to, [target];
    ld.global.u64 %offset, [%row];
    add.u64 %to, %to, %offset;              // where the first byte goes
    ld.param.u64 %from, [source];
    ld.global.u64 %offset, [%row+8];
    add.u64 %from, %from, %offset;          // where the first byte is
    ld.global.u64 %bytes, [%row+16];        // how many

    or.b64 %bits, %to, %from;
    and.b64 %bits, %bits, 15;               // zero if both are multiples of sixteen
    setp.eq.u64 %p, %bits, 0;
    and.b64 %whole, %bytes, -16;            // bytes before the last incomplete sixteen
    selp.b64 %whole, %whole, 0, %p;         // that are copied by sixteens: none if not aligned

    mul.wide.u32 %at, %thread, 16;          // this thread's next sixteen bytes
    mul.wide.u32 %step, %threads, 16;       // from one of its sixteens to the next
FOUR:
    mad.lo.u64 %last, %step, 3, %at;        // its fourth from here
    setp.ge.u64 %p, %last, %whole;
    @%p bra ONE;                            // there are no four any more
    add.u64 %from0, %from, %at;             // addresses of the four
    add.u64 %from1, %from0, %step;
    add.u64 %from2, %from1, %step;
    add.u64 %from3, %from2, %step;
    ld.global.v4.u32 {%a0, %a1, %a2, %a3}, [%from0];  // all four are asked for
    ld.global.v4.u32 {%b0, %b1, %b2, %b3}, [%from1];  // before any is written
    ld.global.v4.u32 {%c0, %c1, %c2, %c3}, [%from2];
    ld.global.v4.u32 {%d0, %d1, %d2, %d3}, [%from3];
    add.u64 %to0, %to, %at;                 // addresses where they go
    add.u64 %to1, %to0, %step;
    add.u64 %to2, %to1, %step;
    add.u64 %to3, %to2, %step;
    st.global.v4.u32 [%to0], {%a0, %a1, %a2, %a3};
    st.global.v4.u32 [%to1], {%b0, %b1, %b2, %b3};
    st.global.v4.u32 [%to2], {%c0, %c1, %c2, %c3};
    st.global.v4.u32 [%to3], {%d0, %d1, %d2, %d3};
    add.u64 %at, %last, %step;              // behind the four
    bra FOUR;
ONE:
    setp.ge.u64 %p, %at, %whole;
    @%p bra REST;                           // no sixteen bytes are left for this thread
    add.u64 %from0, %from, %at;
    ld.global.v4.u32 {%a0, %a1, %a2, %a3}, [%from0];
    add.u64 %to0, %to, %at;
    st.global.v4.u32 [%to0], {%a0, %a1, %a2, %a3};
    add.u64 %at, %at, %step;
    bra ONE;
REST:
    cvt.u64.u32 %at, %thread;
    add.u64 %at, %at, %whole;               // this thread's first byte behind what is copied by sixteens
    cvt.u64.u32 %step, %threads;            // from one of its bytes to the next
BYTE:
    setp.ge.u64 %p, %at, %bytes;
    @%p bra DONE;                           // no byte is left for this thread
    add.u64 %from0, %from, %at;
    ld.global.u8 %a0, [%from0];
    add.u64 %to0, %to, %at;
    st.global.u8 [%to0], %a0;
    add.u64 %at, %at, %step;
    bra BYTE;
DONE:
    ret;
}
"""


class CopyKernel:
    """The kernel, loaded. Any thread."""

    def __init__(self, driver: CudaDriver) -> None:
        """Raises CudaFailed if the driver cannot compile it for its GPU."""
        self.driver = driver
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        driver.call("cuModuleLoadData", ctypes.byref(module), PTX.encode())
        driver.call("cuModuleGetFunction", ctypes.byref(self._function), module, b"copy_runs")

    def launch(self, rows: int, row_count: int, target: int, source: int, stream: int) -> None:
        """Queues a copy of the rows at that address of device memory. Raises CudaFailed."""
        values = (ctypes.c_uint64 * 3)(rows, target, source)
        places = (ctypes.c_void_p * 3)(*(ctypes.addressof(values) + 8 * index for index in range(3)))
        shape = (row_count, 1, 1, _THREADS, 1, 1, 0)
        # The driver copies the values before it returns.
        self.driver.call("cuLaunchKernel", self._function, *shape, stream, places, None)


class KernelStream:
    """A stream with what the kernel needs on it: the list that a launch reads, and host memory that this is filled
    from. Used by one thread at a time."""

    def __init__(self, kernel: CopyKernel, device: Device, stream: Stream) -> None:
        """Raises CudaFailed."""
        self._kernel, self._device, self._stream = kernel, device, stream
        self._rows = device.allocate(MAX_TILES * _ROW_BYTES)
        self._host = device.allocate_host(MAX_TILES * _ROW_BYTES)
        numbers = (ctypes.c_int64 * (3 * MAX_TILES)).from_address(self._host)
        self._filled = np.ctypeslib.as_array(numbers).reshape(-1, 3)  # (MAX_TILES, 3)

    def close(self) -> None:
        """Gives the list back; nothing may be under way, and nothing is queued afterwards."""
        self._device.free(self._rows)
        self._device.free_host(self._host)

    def copy(self, runs: RunList, target: int, source: int) -> None:
        """Queues copies. Nothing that an earlier call queued may be under way: the list is its. Raises CudaFailed."""
        for begin in range(0, len(runs.tiles), MAX_TILES):
            if begin:
                self._stream.synchronize()
            tiles = runs.tiles[begin : begin + MAX_TILES]
            self._filled[: len(tiles)] = tiles
            stream = self._stream.handle
            self._kernel.driver.call("cuMemcpyHtoDAsync_v2", self._rows, self._host, tiles.nbytes, stream)
            self._kernel.launch(self._rows, len(tiles), target, source, stream)
