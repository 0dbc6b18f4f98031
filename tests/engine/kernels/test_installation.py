"""What is compiled at installation is all that an engine needs, so that no start waits for a kernel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import services.engine


@pytest.mark.slow
def test_every_kernel_is_compiled() -> None:
    folder = Path(services.engine.__file__).parent
    ours = [path for path in folder.glob("**/*_kernels.py") if "machine_code" in path.read_text()]
    modules = {".".join(("services.engine", *path.relative_to(folder).with_suffix("").parts)) for path in ours}
    code = "import sys, services.engine.kernels.__main__; print(*sys.modules)"  # a kernel is compiled on import
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert len(modules) > 4
    assert not modules - set(loaded)
