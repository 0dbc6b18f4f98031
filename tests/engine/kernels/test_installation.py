"""What is compiled at installation is all that an engine needs, so that no start waits for a kernel."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import services.engine

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_every_kernel_is_compiled() -> None:
    folder = Path(services.engine.__file__).parent
    ours = [path for path in folder.glob("**/*_kernels.py") if "machine_code" in path.read_text()]
    modules = {".".join(("services.engine", *path.relative_to(folder).with_suffix("").parts)) for path in ours}
    code = "import sys, services.engine.kernels.__main__; print(*sys.modules)"  # a kernel is compiled on import
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert len(modules) > 4
    assert not modules - set(loaded)


ONE_KERNEL = """
from services.engine.kernels.compiling import COMPILING
from services.engine.kernels.machine_code import compiled
from services.rpc.log import configure

@compiled
def add(left, right):
    return left + right

configure("engine")
add(1, 2)
COMPILING.report()
"""


@pytest.mark.slow
def test_a_start_says_that_it_compiles_kernels_and_how_long_it_took(tmp_path: Path) -> None:
    program = tmp_path / "one_kernel.py"
    program.write_text(ONE_KERNEL)
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}

    def said() -> list[str]:
        run = subprocess.run([sys.executable, program], check=True, capture_output=True, text=True, env=environment)
        return run.stderr.splitlines()

    begun, ended = said()
    assert "compiling kernels" in begun
    assert re.search(r'"kernels were compiled" seconds=\d+\.\d$', ended)
    assert said() == []  # they are kept
