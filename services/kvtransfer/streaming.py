"""Copies of pages past the caches, as machine code that llvmlite makes where it is installed.

An ordinary store reads the line that it overwrites, and what a push writes is not read soon by the core that writes it.
Stores that bypass the caches spare both; numpy uses them for single copies of many megabytes only. One call copies any
number of runs of pages without the interpreter lock, so that the copying threads seldom meet.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import platform
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

_log = logging.getLogger(__name__)

# (source page, target page, number of neighbouring pages) a row, (num_runs, 3).
PageRuns: TypeAlias = NDArray[np.int64]
# From the pages of a layer into those of another, (num_pages, page_bytes) each: all runs are in place when it returns.
CopyPages: TypeAlias = Callable[[NDArray[np.uint8], NDArray[np.uint8], PageRuns], None]

# Bytes that the machine code copies at a time; pages of other sizes are left to numpy.
_STEP_BYTES = 256

# Four loads before four stores, a line of 64 bytes each. The fence makes them visible before whatever is stored after
# the copy; on x86 only sfence promises that of stores that bypass the caches.
_FENCE = "call void @llvm.x86.sse.sfence()" if platform.machine() == "x86_64" else "fence seq_cst"
_ASSEMBLY = f"""
declare void @llvm.x86.sse.sfence()

define void @copy_pages(i64 %source, i64 %target, i64 %page_bytes, ptr %runs, i64 %num_runs) {{
begin:
  br label %run
run:
  %index = phi i64 [ 0, %begin ], [ %next_index, %end_of_run ]
  %source_page_at = getelementptr [3 x i64], ptr %runs, i64 %index, i64 0
  %target_page_at = getelementptr [3 x i64], ptr %runs, i64 %index, i64 1
  %count_at = getelementptr [3 x i64], ptr %runs, i64 %index, i64 2
  %source_page = load i64, ptr %source_page_at
  %target_page = load i64, ptr %target_page_at
  %count = load i64, ptr %count_at
  %source_offset = mul i64 %source_page, %page_bytes
  %target_offset = mul i64 %target_page, %page_bytes
  %num_bytes = mul i64 %count, %page_bytes
  %from = add i64 %source, %source_offset
  %to = add i64 %target, %target_offset
  br label %step
step:
  %offset = phi i64 [ 0, %run ], [ %next_offset, %step ]
  %from_here = add i64 %from, %offset
  %to_here = add i64 %to, %offset
  %from_0 = inttoptr i64 %from_here to ptr
  %from_1 = getelementptr i8, ptr %from_0, i64 64
  %from_2 = getelementptr i8, ptr %from_0, i64 128
  %from_3 = getelementptr i8, ptr %from_0, i64 192
  %to_0 = inttoptr i64 %to_here to ptr
  %to_1 = getelementptr i8, ptr %to_0, i64 64
  %to_2 = getelementptr i8, ptr %to_0, i64 128
  %to_3 = getelementptr i8, ptr %to_0, i64 192
  %line_0 = load <8 x i64>, ptr %from_0, align 64
  %line_1 = load <8 x i64>, ptr %from_1, align 64
  %line_2 = load <8 x i64>, ptr %from_2, align 64
  %line_3 = load <8 x i64>, ptr %from_3, align 64
  store <8 x i64> %line_0, ptr %to_0, align 64, !nontemporal !0
  store <8 x i64> %line_1, ptr %to_1, align 64, !nontemporal !0
  store <8 x i64> %line_2, ptr %to_2, align 64, !nontemporal !0
  store <8 x i64> %line_3, ptr %to_3, align 64, !nontemporal !0
  %next_offset = add i64 %offset, 256
  %is_inside = icmp ult i64 %next_offset, %num_bytes
  br i1 %is_inside, label %step, label %end_of_run
end_of_run:
  %next_index = add i64 %index, 1
  %is_left = icmp ult i64 %next_index, %num_runs
  br i1 %is_left, label %run, label %end
end:
  {_FENCE}
  ret void
}}
!0 = !{{ i32 1 }}
"""


def copy_plainly(source: NDArray[np.uint8], target: NDArray[np.uint8], runs: PageRuns) -> None:
    """A CopyPages by numpy, a copy a run; each releases the interpreter lock."""
    for source_page, target_page, count in runs.tolist():
        target[target_page : target_page + count] = source[source_page : source_page + count]


@functools.cache
def page_copier() -> CopyPages:
    """The best CopyPages there is, made at the first call."""
    try:
        import llvmlite.binding as llvm

        code = _compiled(llvm)
    except (ImportError, OSError, RuntimeError) as error:  # not installed, not loadable, not for this processor
        _log.info("pages are copied by numpy", extra={"fields": {"why": str(error)}})
        return copy_plainly

    def copy(source: NDArray[np.uint8], target: NDArray[np.uint8], runs: PageRuns) -> None:
        page_bytes = source.shape[1]
        if page_bytes % _STEP_BYTES or source.ctypes.data % 64 or target.ctypes.data % 64:
            copy_plainly(source, target, runs)
        elif len(runs):
            code(source.ctypes.data, target.ctypes.data, page_bytes, runs.ctypes.data, len(runs))

    return copy


def _compiled(llvm: Any) -> Callable[[int, int, int, int, int], None]:
    """Raises RuntimeError if LLVM cannot. The function releases the interpreter lock while it runs."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    module = llvm.parse_assembly(_ASSEMBLY)
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=2
    )
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    made = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 5)(engine.get_function_address("copy_pages"))

    def call(source: int, target: int, page_bytes: int, runs: int, num_runs: int, _keep: object = engine) -> None:
        made(source, target, page_bytes, runs, num_runs)

    return call
