"""Triton's kernels compile for GPUs that are not here, by the way an engine launches them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Bytes of shared memory that a program may have, from the tables of the CUDA programming guide.
SHARED_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}
KERNELS = {
    "add_norm",
    "rotate_and_store",
    "activate",
    "attend_piece",
    "add_pieces",
    "attend_tile",
    "multiply_few",
    "add_sums",
}


# Capability 90 takes two minutes on a core that it has for itself.
@pytest.mark.slow
@pytest.mark.timeout(1900)
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_every_kernel_compiles_and_fits(tmp_path: Path, capability: int) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", "-m", "tests.engine.gpu.compile_kernels", str(capability)]
    done = subprocess.run(
        command, env={**environment, "TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr
    compiled = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, _, _ in compiled} == KERNELS
    assert max(int(shared) for _, _, shared in compiled) <= SHARED_BYTES[capability]
