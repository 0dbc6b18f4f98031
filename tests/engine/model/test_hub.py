"""Models of a hub, fetched by processes with the real library: whole, interrupted, altered, without the hub."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from services.engine.model.loader import load_model
from tests.engine.model.fake_hub import FakeHub, hub_of
from tests.models import make_tiny_llama

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
# The library hands over pieces of 10 MiB.
PIECE = 10 << 20
LARGE = os.urandom(3 * PIECE + 1000)
MODEL, FILE = "some/model", "some/model/tiny.gguf"
CODE = """
import sys
from services.engine.model.errors import ModelError
from services.engine.model.fetch import fetch_model
try:
    print(fetch_model(sys.argv[1], show_progress=sys.argv[2] == "shown"))
except ModelError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""

Fetch = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def fetch(tmp_path: Path) -> Fetch:
    """`fetch(hub, name)`: a process that fetches a model, with caches of this test's own."""

    def start(hub: FakeHub | None, name: str, *, shown: bool = False) -> subprocess.Popen[str]:
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))},
            "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}",
            "HF_HOME": str(tmp_path / "hf"),
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
            "HF_ENDPOINT": hub.url if hub else "http://127.0.0.1:1",
        }
        command = [sys.executable, "-c", CODE, name, "shown" if shown else "hidden"]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


def ended(process: subprocess.Popen[str]) -> tuple[Path, str]:
    """What it fetched, and what it showed."""
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return Path(output.strip()), errors


def refused(process: subprocess.Popen[str]) -> str:
    """Its one line."""
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, output) == (1, "")
    return errors.strip().splitlines()[-1]


def files_of(folder: Path) -> dict[str, bytes]:
    """A tiny model, and what is not fetched of a hub model."""
    make_tiny_llama(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    return {**files, "pytorch_model.bin": b"not fetched", "consolidated.safetensors": b"not fetched"}


def part_of(tmp_path: Path) -> Path:
    """The blobs that the library has, and what is there of those under way."""
    return tmp_path / "hf" / "hub" / "models--some--model" / "blobs"


def test_a_folder_is_fetched_and_serves_without_the_hub(tmp_path: Path, fetch: Fetch) -> None:
    with hub_of(files_of(tmp_path / "tiny")) as hub:
        folder, shown = ended(fetch(hub, MODEL, shown=True))
        assert "Downloading some/model: 1 of 1 MB" in shown
        assert {path.name for path in folder.iterdir()} == set(hub.files) - {
            "pytorch_model.bin",
            "consolidated.safetensors",
        }
        ours, theirs = (load_model(path, device="cpu", dtype=torch.float32) for path in (folder, tmp_path / "tiny"))
        assert ours.digest == theirs.digest
        fetched = len(hub.ranges)
        again, shown = ended(fetch(hub, MODEL))
        assert (again, len(hub.ranges)) == (folder, fetched)
        assert not shown
    assert ended(fetch(None, MODEL))[0] == folder


@pytest.mark.parametrize("name", [MODEL, FILE])
def test_a_killed_download_goes_on_where_it_was(tmp_path: Path, fetch: Fetch, name: str) -> None:
    large = "tiny.gguf" if name == FILE else "model.safetensors"
    with hub_of({large: LARGE, "config.json": b"{}"}) as hub:
        hub.send_at_most[large] = 2 * PIECE + 500
        process = fetch(hub, name)
        while sum(path.stat().st_size for path in part_of(tmp_path).glob("*.incomplete")) < 2 * PIECE:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)  # a process tells nobody how much it has written
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        hub.send_at_most.clear()
        fetched, _ = ended(fetch(hub, name))
        content = fetched if name == FILE else fetched / large
        assert content.read_bytes() == LARGE
        assert [begin for name, begin in hub.ranges if name == large] == [0, 2 * PIECE]
        assert not list(part_of(tmp_path).glob("*.incomplete"))


def test_an_altered_file_is_named_and_fetched_anew(tmp_path: Path, fetch: Fetch) -> None:
    with hub_of({"tiny.gguf": LARGE}) as hub:
        part_of(tmp_path).mkdir(parents=True)
        part = part_of(tmp_path) / f"{hub.sha256('tiny.gguf')}.incomplete"
        part.write_bytes(b"something else")
        assert refused(fetch(hub, FILE)) == (
            "ModelCorrupt: tiny.gguf of some/model arrived altered: its SHA-256 differs. Try again."
        )
        part.write_bytes(LARGE + b"more than there is")
        assert ended(fetch(hub, FILE))[0].read_bytes() == LARGE


def test_two_processes_share_one_download(tmp_path: Path, fetch: Fetch) -> None:
    with hub_of({"tiny.gguf": LARGE}) as hub:
        processes = [fetch(hub, FILE) for _ in range(2)]
        assert ended(processes[0])[0] == ended(processes[1])[0]
        assert hub.ranges == [("tiny.gguf", 0)]


def test_what_cannot_be_fetched_is_one_line(tmp_path: Path, fetch: Fetch) -> None:
    with hub_of({"config.json": b"{}"}) as hub:
        for name in ("some/absent", "some/model/absent.gguf"):
            assert refused(fetch(hub, name)).startswith("ModelNotFound: some/")
            assert "404" in refused(fetch(hub, name))
    assert "could not be fetched from the Hugging Face hub" in refused(fetch(None, MODEL))


def test_a_hub_that_never_answers_is_given_up(tmp_path: Path, fetch: Fetch) -> None:
    with hub_of({}) as hub:
        hub.silent = True
        assert "timed out" in refused(fetch(hub, MODEL))
