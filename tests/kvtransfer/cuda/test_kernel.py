"""The copy kernel: its own PTX, interpreted, moves what it is told to and nothing else; what a start makes of it."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from services.kvtransfer.config import KvTransferConfig
from services.kvtransfer.errors import DeviceFailed
from services.kvtransfer.transports.cuda_ipc import gpu, kernel_trial
from services.kvtransfer.transports.cuda_ipc import kernel as kernel_module
from services.kvtransfer.transports.cuda_ipc.copies import RunCopier
from services.kvtransfer.transports.cuda_ipc.device import CudaDevice
from services.kvtransfer.transports.cuda_ipc.gpu import open_gpu
from services.kvtransfer.transports.cuda_ipc.kernel import PTX, CopyKernel
from services.kvtransfer.transports.cuda_ipc.kernel_trial import choose_kernel
from services.kvtransfer.transports.cuda_ipc.runs import TILE_BYTES, RunList
from services.rpc.cuda_driver import CudaDriver
from services.rpc.errors import StartError
from tests.kvtransfer.cuda.fake_libcuda import FakeLibcuda
from tests.kvtransfer.pattern import pattern

LENGTHS = (1, 2, 15, 16, 17, 31, 32, 100, 4095, 4096, 4097, 5000, TILE_BYTES - 1, TILE_BYTES, TILE_BYTES + 33)


class Bench:
    """Two areas of device memory and copies between them."""

    def __init__(self, *, with_kernel: bool = True, size_bytes: int = 1 << 17) -> None:
        self.library = FakeLibcuda()
        driver = CudaDriver(0, self.library)
        device = CudaDevice(driver)
        self.copier = RunCopier(device, 1, CopyKernel(driver) if with_kernel else None)
        self.source, self.target = device.allocate(size_bytes), device.allocate(size_bytes)
        self.sent, self.kept = (self.library.memory(address) for address in (self.source, self.target))
        self.sent[:], self.kept[:] = pattern(1, size_bytes), pattern(2, size_bytes)
        self.library.log.clear()

    def copy(self, runs: Sequence[tuple[int, int, int]]) -> None:
        """Copies, and checks all of the target."""
        wanted: NDArray[np.uint8] = self.kept.copy()
        for to, begin, length in runs:
            wanted[to : to + length] = self.sent[begin : begin + length]
        self.copier.copy(RunList.of(runs), self.target, self.source)
        np.testing.assert_array_equal(self.kept, wanted)


@pytest.mark.parametrize(("to", "begin"), [(0, 0), (16, 48), (1, 0), (0, 8), (5, 5), (12, 4)])
def test_one_run_of_every_length(to: int, begin: int) -> None:
    bench = Bench()
    for length in LENGTHS:
        bench.copy([(to, begin, length)])


def test_many_scattered_runs_in_one_launch() -> None:
    bench = Bench()
    random = np.random.default_rng(0)
    places = random.permutation(40).tolist()
    runs = [(1000 * place + place % 3, 1000 * index, 1 + 23 * index) for index, place in enumerate(places)]
    bench.copy(runs)
    assert bench.library.log.count("cuLaunchKernel") == 1
    assert "cuMemcpyDtoDAsync_v2" not in bench.library.log


def test_a_list_that_is_longer_than_its_memory_waits_before_it_is_filled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_module, "MAX_TILES", 3)
    bench = Bench()
    bench.copy([(0, 0, 2 * TILE_BYTES), (40_000, 50_000, 300), (60_000, 70_000, 4), (80_000, 90_000, 64)])
    calls = [call for call in bench.library.log if call != "cuCtxSetCurrent"]
    once = ["cuMemcpyHtoDAsync_v2", "cuLaunchKernel", "cuStreamSynchronize"]
    assert calls == once * 2


@pytest.mark.parametrize("with_kernel", [True, False])
def test_no_runs(with_kernel: bool) -> None:
    Bench(with_kernel=with_kernel).copy([])


@pytest.mark.parametrize("call", ["cuMemcpyHtoDAsync_v2", "cuLaunchKernel"])
def test_a_launch_that_is_refused_is_told_and_the_next_copy_is_right(call: str) -> None:
    bench = Bench()
    bench.library.failing[call] = 700
    with pytest.raises(DeviceFailed, match=f"{call}: fake error 700"):
        bench.copier.copy(RunList.of([(0, 0, 64)]), bench.target, bench.source)
    # The list may be read until the stream is empty, and the stream is handed on after that alone.
    assert bench.library.log[-1] == "cuStreamSynchronize"
    bench.library.failing.clear()
    bench.copy([(0, 0, 64)])


@pytest.mark.parametrize("length", [1, 15, 16, TILE_BYTES, TILE_BYTES + 1, 5 * TILE_BYTES - 7])
def test_tiles_are_the_run_and_no_more(length: int) -> None:
    rows = RunList.of([(3, 5, 10), (1000, 2000, length)])
    assert rows.num_bytes == length + 10
    assert rows.tiles[:, 2].min() >= 1
    assert rows.tiles[:, 2].max() <= TILE_BYTES
    covered = [(to + at, begin + at) for to, begin, count in rows.tiles.tolist() for at in range(count)]
    assert covered == [(3 + at, 5 + at) for at in range(10)] + [(1000 + at, 2000 + at) for at in range(length)]


def _choose(library: FakeLibcuda) -> tuple[CopyKernel | None, str]:
    return choose_kernel(CudaDriver(0, library))


def test_a_start_tries_the_kernel_and_gives_back_what_that_took() -> None:
    library = FakeLibcuda()
    kernel, way = _choose(library)
    assert kernel is not None
    assert way == "by the kernel"
    assert library.allocations == (0, 0)
    assert library.log.count("cuStreamCreate") == library.log.count("cuStreamDestroy_v2") == 1


MISTAKES = {
    "no_rest": ("setp.ge.u64 %p, %at, %bytes;", "setp.ge.u64 %p, %at, 0;"),
    "one_too_many": ("and.b64 %whole, %bytes, -16;", "add.u64 %whole, %bytes, 15; and.b64 %whole, %whole, -16;"),
    "three_of_four": ("st.global.v4.u32 [%to3], {%d0, %d1, %d2, %d3};", ""),
    "wrong_order": ("[%to1], {%b0, %b1, %b2, %b3}", "[%to1], {%b1, %b0, %b2, %b3}"),
    "target_for_source": ("add.u64 %from, %from, %offset;", "add.u64 %from, %to, 0;"),
    "every_block_the_first": ("mov.u32 %block, %ctaid.x;", "mov.u32 %block, 0;"),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_kernel_that_copies_otherwise_is_not_used(
    mistake: tuple[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert mistake[0] in PTX
    monkeypatch.setattr(kernel_module, "PTX", PTX.replace(*mistake))
    library = FakeLibcuda()
    with caplog.at_level(logging.WARNING):
        kernel, way = _choose(library)
    assert kernel is None
    assert way == "run by run: it copies other bytes than the driver"
    assert "the copy kernel is not used: pages are copied run by run" in caplog.messages
    assert library.allocations == (0, 0)


def test_a_kernel_that_breaks_the_gpu_ends_the_start_and_may_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_module, "PTX", PTX.replace("add.u64 %from, %from, %offset;", "mov.u64 %from, 4096;"))
    monkeypatch.setattr(gpu, "CudaDriver", lambda ordinal: CudaDriver(ordinal, FakeLibcuda()))
    config = KvTransferConfig(listen="127.0.0.1:0", cuda_device=0)
    with pytest.raises(StartError, match=r"--cuda-device 0: .*: fake error 700"):
        open_gpu(config)
    assert open_gpu(dataclasses.replace(config, copy_kernel=False)) is not None


@pytest.mark.parametrize(("before", "after"), [(None, "32"), ("16", "16")])
def test_the_driver_is_asked_for_queues_unless_somebody_else_said_how_many(
    monkeypatch: pytest.MonkeyPatch, before: str | None, after: str
) -> None:
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    monkeypatch.setenv(name, before or "")
    if before is None:
        monkeypatch.delenv(name)
    monkeypatch.setattr(gpu, "CudaDriver", lambda ordinal: CudaDriver(ordinal, FakeLibcuda()))
    open_gpu(KvTransferConfig(listen="127.0.0.1:0", cuda_device=0, copy_kernel=False))
    assert os.environ[name] == after


@pytest.mark.parametrize("call", ["cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernel", "cuMemAlloc_v2"])
def test_a_kernel_that_cannot_run_is_not_used(call: str) -> None:
    library = FakeLibcuda()
    library.failing[call] = 218
    kernel, way = _choose(library)
    assert kernel is None
    assert way == f"run by run: {call}: fake error 218"


def test_a_kernel_that_never_ends_does_not_keep_the_service_from_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_trial, "_TIMEOUT_S", 0.0)
    library = FakeLibcuda()
    library.busy = True
    kernel, way = _choose(library)
    assert kernel is None
    assert way == "run by run: the kernel did not end within 0 s"
    # Freeing memory waits for the GPU.
    assert "cuMemFree_v2" not in library.log


def _assembler() -> str | None:
    spec = importlib.util.find_spec("triton")
    folders = [Path(place) / "backends/nvidia/bin" for place in spec.submodule_search_locations or ()] if spec else []
    shipped = [str(folder / "ptxas") for folder in folders if (folder / "ptxas").is_file()]
    return shutil.which("ptxas") or next(iter(shipped), None)


@pytest.mark.parametrize("capability", ["sm_80", "sm_90"])
def test_it_is_what_the_assembler_takes(tmp_path: Path, capability: str) -> None:
    assembler = _assembler()
    if assembler is None:
        pytest.skip("triton is not installed: its ptxas would assemble the copy kernel")
    text = tmp_path / "copy_runs.ptx"
    text.write_text(PTX)
    command = [assembler, "-v", "--warning-as-error", f"-arch={capability}", str(text), "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in done.stdout + done.stderr
