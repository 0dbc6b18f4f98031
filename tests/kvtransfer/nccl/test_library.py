"""Finding libnccl and reading what it is; and the real library where there is one, with no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.kvtransfer.transports.nccl import library
from services.kvtransfer.transports.nccl.library import Build, NcclFailed, NcclLibrary, NcclMissing


def _real() -> Path | None:
    try:
        return library.find("auto")
    except NcclMissing:
        return None


needs_nccl = pytest.mark.skipif(_real() is None, reason="NCCL is not installed (nvidia-nccl-cu12 or nvidia-nccl-cu13)")


def _install(root: Path, package: str) -> Path:
    """A file of that name where `package` would have it; it is not a library."""
    folder = root / package / "lib"
    folder.mkdir(parents=True)
    path = folder / "libnccl.so.2"
    path.write_bytes(b"\0NCCL version 2.27.3+cuda12.9\0")
    return path


def test_the_setting_comes_first_then_torch_then_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, torch, wheel = (tmp_path / name for name in ("mine.so", "torch", "nvidia/nccl"))
    roots = {"torch": [torch], "nvidia.nccl": [wheel]}
    monkeypatch.setattr(library, "_roots", roots.get)
    with pytest.raises(NcclMissing, match="nvidia-nccl-cu12 nor nvidia-nccl-cu13"):
        library.find("auto")
    from_wheel = _install(tmp_path, "nvidia/nccl")
    assert library.find("auto") == from_wheel
    from_torch = _install(tmp_path, "torch")
    assert library.find("auto") == from_torch
    with pytest.raises(NcclMissing, match="no file"):
        library.find(str(mine))
    mine.touch()
    assert library.find(str(mine)) == mine


def test_the_build_is_read_from_the_file(tmp_path: Path) -> None:
    build = library.read_build(_install(tmp_path, "torch"))
    assert build == Build((2, 27, 3), 12)
    assert str(build) == "2.27.3+cuda12"
    other = tmp_path / "other"
    other.write_bytes(b"nothing")
    with pytest.raises(NcclMissing, match="does not say"):
        library.read_build(other)


@pytest.mark.parametrize(
    ("build", "driver", "why"),
    [
        (Build((2, 17, 1), 12), 13, "older than 2.18.0"),
        (Build((2, 30, 0), 13), 12, "needs a driver for CUDA 13, not 12"),
        (Build((2, 30, 0), 12), 12, None),
        (Build((2, 30, 0), 12), 13, None),
    ],
)
def test_cuda_majors_are_compared(build: Build, driver: int, why: str | None) -> None:
    if why is None:
        library.check_build(build, driver)
        return
    with pytest.raises(NcclMissing, match=why):
        library.check_build(build, driver)


def test_a_file_that_is_no_library(tmp_path: Path) -> None:
    with pytest.raises(NcclMissing):
        NcclLibrary(_install(tmp_path, "torch"))


@needs_nccl
def test_the_real_library_says_what_its_file_says() -> None:
    path = _real()
    assert path is not None
    assert NcclLibrary(path).version() == library.read_build(path).version


@needs_nccl
def test_the_real_library_names_communicators() -> None:
    path = _real()
    assert path is not None
    nccl = NcclLibrary(path)
    first, second = nccl.unique_id(), nccl.unique_id()
    assert len(first) == len(second) == library.UNIQUE_ID_BYTES
    assert first != second


@needs_nccl
def test_the_real_library_refuses_without_a_driver_and_an_empty_group_is_fine() -> None:
    path = _real()
    assert path is not None
    nccl = NcclLibrary(path)
    nccl.group_start()
    nccl.group_end()
    if _driver_is_there():
        pytest.skip("no GPU may be there for this one")
    with pytest.raises(NcclFailed, match="ncclCommInitRankConfig"):
        nccl.init(nccl.unique_id(), 0)


def _driver_is_there() -> bool:
    return Path("/proc/driver/nvidia/version").exists()
