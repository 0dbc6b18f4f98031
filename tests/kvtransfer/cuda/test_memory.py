"""Device memory that two processes map: calls of the driver in order, and what is given back when one fails."""

from __future__ import annotations

import ctypes
import logging
import os
from contextlib import suppress

import pytest

from services.rpc.cuda_driver import CudaDriver, CudaFailed, CudaMissing
from services.rpc.cuda_memory import DeviceSegment
from tests.kvtransfer.cuda.fake_libcuda import GRANULARITY, UUID, FakeLibcuda

VMM_CALLS = ("cuMemAddressReserve", "cuMemMap", "cuMemSetAccess")


def _descriptors() -> int:
    """Of memory of the fake GPU; others come and go with what earlier tests left."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            count += "fake-gpu" in os.readlink(f"/proc/self/fd/{name}")
    return count


def test_what_is_known_of_a_gpu() -> None:
    driver = CudaDriver(0, FakeLibcuda())
    assert (driver.uuid, driver.cuda_major) == (UUID, 13)


def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(CudaMissing, match="fake error 100"):
        CudaDriver(1, FakeLibcuda())


def test_a_gpu_that_shares_no_memory() -> None:
    library = FakeLibcuda()
    library.shares_memory = False
    with pytest.raises(CudaMissing, match="cannot share its memory"):
        CudaDriver(0, library)


def test_memory_that_cannot_be_unmapped_stops_nobody_from_letting_go_of_the_rest(
    caplog: pytest.LogCaptureFixture,
) -> None:
    library = FakeLibcuda()
    before = _descriptors()
    segment = DeviceSegment.create(CudaDriver(0, library), GRANULARITY)
    library.failing["cuMemUnmap"] = 700
    with caplog.at_level(logging.WARNING):
        segment.close()
        segment.close()
    assert caplog.messages == ["memory of the GPU stays mapped"]
    assert _descriptors() == before


def test_two_processes_see_the_same_bytes() -> None:
    maker, importer = FakeLibcuda(), FakeLibcuda()
    mine = DeviceSegment.create(CudaDriver(0, maker), 5000)
    theirs = DeviceSegment.adopt(CudaDriver(0, importer), os.dup(mine.descriptor), 5000)
    ctypes.memset(mine.address, 7, 5000)
    assert ctypes.string_at(theirs.address, 5000) == b"\7" * 5000
    calls = [call for call in maker.log if call.startswith("cuMem")]
    assert calls == [
        "cuMemGetAllocationGranularity",
        "cuMemCreate",
        "cuMemExportToShareableHandle",
        "cuMemGetAllocationGranularity",
        *VMM_CALLS,
        "cuMemRelease",
    ]
    # The maker's end takes nothing from the importer.
    mine.close()
    mine.close()
    assert (maker.mapped, maker.handles) == (0, 0)
    assert ctypes.string_at(theirs.address, 5000) == b"\7" * 5000
    theirs.close()
    assert (importer.mapped, importer.handles) == (0, 0)


@pytest.mark.parametrize("call", ["cuMemCreate", "cuMemExportToShareableHandle", *VMM_CALLS])
def test_nothing_is_left_of_a_segment_that_could_not_be_made(call: str) -> None:
    library = FakeLibcuda()
    driver = CudaDriver(0, library)
    before = _descriptors()
    library.failing[call] = 2
    with pytest.raises(CudaFailed, match=f"{call}: fake error 2"):
        DeviceSegment.create(driver, GRANULARITY)
    assert (library.mapped, library.handles, _descriptors()) == (0, 0, before)


@pytest.mark.parametrize("call", ["cuMemImportFromShareableHandle", "cuMemGetAllocationGranularity", *VMM_CALLS])
def test_nothing_is_left_of_a_segment_that_could_not_be_adopted(call: str) -> None:
    mine = DeviceSegment.create(CudaDriver(0, FakeLibcuda()), GRANULARITY)
    library = FakeLibcuda()
    driver = CudaDriver(0, library)
    before = _descriptors()
    library.failing[call] = 1
    with pytest.raises(CudaFailed):
        DeviceSegment.adopt(driver, os.dup(mine.descriptor), GRANULARITY)
    assert (library.mapped, library.handles, _descriptors()) == (0, 0, before)
    mine.close()


def test_another_size_and_another_kind_of_descriptor_are_refused() -> None:
    mine = DeviceSegment.create(CudaDriver(0, FakeLibcuda()), GRANULARITY)
    driver = CudaDriver(0, FakeLibcuda())
    for descriptor, size_bytes in ((os.dup(mine.descriptor), 3 * GRANULARITY), (os.eventfd(0), GRANULARITY)):
        with pytest.raises(CudaFailed):
            DeviceSegment.adopt(driver, descriptor, size_bytes)
    mine.close()
