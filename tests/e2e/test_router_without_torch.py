"""The router in an environment of its own: installed without extras, no torch, and it starts."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("pyproject.toml", "README.md", "LICENSE", "services", "gen")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of programs of a fresh virtual environment that holds the package, installed from a copy."""
    folder = tmp_path_factory.mktemp("clean")
    source = folder / "source"
    source.mkdir()
    for part in PARTS:  # a copy, because building leaves its own folders beside the source
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy2
        copy(ROOT / part, source / part)
    # Our pip puts things there: installing one and compiling what is never imported takes longer than all else.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    programs = folder / "venv" / "bin"
    pip = [sys.executable, "-m", "pip", "--python", programs / "python", "install", "--quiet", "--no-compile"]
    subprocess.run([*pip, "-c", ROOT / "constraints.txt", source], check=True)
    return programs


def run(command: Sequence[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs outside of the repository, so that only what is installed can be imported."""
    return subprocess.run(command, cwd=folder, env={}, capture_output=True, text=True, timeout=60, check=False)


def test_there_is_no_torch_and_the_programs_answer(environment: Path, tmp_path: Path) -> None:
    missing = run([environment / "python", "-c", "import torch"], tmp_path)
    assert "No module named 'torch'" in missing.stderr
    for program in ("microserve-router", "microserve-kvtransfer", "microserve-engine", "microserve"):
        shown = run([environment / program, "--help"], tmp_path)
        assert (shown.returncode, shown.stderr) == (0, ""), program
        assert program in shown.stdout


@pytest.mark.parametrize(
    ("command", "code"), [("microserve up", 1), ("microserve-engine --model smollm2-135m --kvtransfer none", 2)]
)
def test_what_needs_an_engine_says_what_to_install(command: str, code: int, environment: Path, tmp_path: Path) -> None:
    program, *options = command.split()
    refused = run([environment / program, *options], tmp_path)
    assert refused.returncode == code
    assert refused.stderr.count("\n") == 1
    assert "pip install '.[engine]'" in refused.stderr


def test_router_starts(environment: Path, tmp_path: Path) -> None:
    options = ["--listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0", "--policy", "data_parallel"]
    # Nobody listens there: a router waits for its engines, it does not need them to start.
    command = [environment / "microserve-router", *options, "--engine", "127.0.0.1:1"]
    with subprocess.Popen(command, cwd=tmp_path, env={}, stdout=subprocess.PIPE, text=True) as router:
        assert router.stdout is not None
        assert router.stdout.readline().startswith('READY {"service":"router"')
        loaded = Path(f"/proc/{router.pid}/maps").read_text()
        assert "torch" not in loaded
        router.terminate()
        assert router.wait(timeout=30) == 0
