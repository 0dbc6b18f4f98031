"""Models of a hub, fetched by processes with the real library: whole, interrupted, altered, without the hub."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from services.engine.model.loader import load_model
from tests.engine.model.fake_hub import COMMIT, FakeHub, hub_of
from tests.models import make_tiny_llama

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
# The library hands over pieces of 10 MiB.
PIECE = 10 << 20
LARGE = os.urandom(3 * PIECE + 1000)
MODEL, FILE = "some/model", "some/model/tiny.gguf"
CODE = """
import sys
from services.engine.model import hub
from services.engine.model.errors import ModelError
from services.engine.model.fetch import fetch_model
hub._ANSWER_S = float(sys.argv[3])
try:
    print(fetch_model(sys.argv[1], show_progress=sys.argv[2] == "shown"))
except ModelError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""

Fetch = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def fetch(tmp_path: Path) -> Fetch:
    """`fetch(hub, name)`: a process that fetches a model, with caches of this test's own.

    `first` is code that it runs before, and `more` goes into its environment.
    """

    def start(
        hub: FakeHub | None, name: str, *, shown: bool = False, first: str = "", answer_s: float = 100, **more: str
    ) -> subprocess.Popen[str]:
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))},
            "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}",
            "HF_HOME": str(tmp_path / "hf"),
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
            "HF_ENDPOINT": hub.url if hub else "http://127.0.0.1:1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "100",  # a slow machine is not asked twice
            "HF_HUB_ETAG_TIMEOUT": "100",
            **more,
        }
        command = [sys.executable, "-c", f"{first}\n{CODE}", name, "shown" if shown else "hidden", str(answer_s)]
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
        assert hub.revisions == {COMMIT}  # a push meanwhile changes nothing
        note = part_of(tmp_path).parent / "refs" / "main"
        assert note.read_text() == COMMIT
        noted = note.stat()
        fetched = len(hub.ranges)
        again, shown = ended(fetch(hub, MODEL))
        assert (again, len(hub.ranges)) == (folder, fetched)
        assert not shown
        assert os.path.samestat(note.stat(), noted)  # a whole cache is not written to
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
        assert [begin for name, begin in hub.ranges if name == large][-1] == 2 * PIECE
        assert not list(part_of(tmp_path).glob("*.incomplete"))


def begun(tmp_path: Path, hub: FakeHub, content: bytes) -> Path:
    """What an earlier process left of tiny.gguf."""
    part_of(tmp_path).mkdir(parents=True, exist_ok=True)
    part = part_of(tmp_path) / f"{hub.sha256('tiny.gguf')}.microserve.incomplete"
    part.write_bytes(content)
    return part


@pytest.mark.parametrize("content", [b"something else", LARGE + b"more than there is"])
def test_a_part_that_is_wrong_is_begun_anew(tmp_path: Path, fetch: Fetch, content: bytes) -> None:
    with hub_of({"tiny.gguf": LARGE}) as hub:
        begun(tmp_path, hub, content)
        assert ended(fetch(hub, FILE))[0].read_bytes() == LARGE
        assert hub.ranges[-1] == ("tiny.gguf", 0)


def test_an_altered_file_is_named_and_fetched_anew(tmp_path: Path, fetch: Fetch) -> None:
    with hub_of({"tiny.gguf": LARGE}) as hub:
        hub.told["tiny.gguf"] = {"sha256": "0" * 64}
        assert refused(fetch(hub, FILE)) == (
            "ModelCorrupt: tiny.gguf of some/model arrived altered: its SHA-256 differs. Try again."
        )
        assert not list(part_of(tmp_path).iterdir())
        hub.told.clear()
        assert ended(fetch(hub, FILE))[0].read_bytes() == LARGE


def test_a_hub_without_ranges_begins_anew(tmp_path: Path, fetch: Fetch) -> None:
    with hub_of({"tiny.gguf": LARGE}) as hub:
        hub.knows_ranges = False
        begun(tmp_path, hub, LARGE[:PIECE])
        assert ended(fetch(hub, FILE))[0].read_bytes() == LARGE


def test_a_file_without_an_end_is_given_up(tmp_path: Path, fetch: Fetch) -> None:
    with hub_of({"tiny.gguf": LARGE}) as hub:
        hub.endless.add("tiny.gguf")
        assert refused(fetch(hub, FILE)) == (
            f"ModelCorrupt: tiny.gguf of some/model is longer than the {len(LARGE)} bytes that the hub told."
        )
        assert not list(part_of(tmp_path).iterdir())


@pytest.mark.parametrize("sha256", ["/{}/outside", "../../../../../outside", "A" * 64, "0" * 63, ""])
def test_a_hash_that_is_none_writes_nothing(tmp_path: Path, fetch: Fetch, sha256: str) -> None:
    outside = [tmp_path / f"outside{end}" for end in ("", ".lock", ".incomplete", ".microserve.incomplete")]
    for path in outside:
        path.write_bytes(b"mine")
    with hub_of({"tiny.gguf": LARGE}) as hub:
        hub.told["tiny.gguf"] = {"sha256": sha256.format(tmp_path)}
        assert refused(fetch(hub, FILE)).startswith("ModelCorrupt: The hub tells a SHA-256 of tiny.gguf")
    assert not hub.ranges
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == dict.fromkeys(
        outside, b"mine"
    )


@pytest.mark.parametrize("size", [-1, "10", 1.5, True])
def test_a_size_that_is_none_is_named(fetch: Fetch, size: object) -> None:
    with hub_of({"tiny.gguf": LARGE}) as hub:
        hub.told["tiny.gguf"] = {"size": size}
        assert refused(fetch(hub, FILE)).startswith("ModelCorrupt: The hub tells a size of tiny.gguf")


def test_a_file_in_a_subfolder(fetch: Fetch) -> None:
    with hub_of({"sub/a.gguf": LARGE, "a.gguf": b"another"}) as hub:
        fetched, _ = ended(fetch(hub, "some/model/sub/a.gguf"))
        assert fetched.read_bytes() == LARGE
        assert hub.ranges == [("sub/a.gguf", 0)]
    assert ended(fetch(None, "some/model/sub/a.gguf", HF_HUB_OFFLINE="1"))[0] == fetched


def test_shards_come_together(fetch: Fetch) -> None:
    shards = {f"model-{index}.safetensors": os.urandom(1000 + index) for index in range(8)}
    with hub_of(shards) as hub:
        hub.together = threading.Barrier(len(shards))
        folder, shown = ended(fetch(hub, MODEL, shown=True))
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == shards
        assert sorted(hub.ranges) == [(name, 0) for name in shards]
        assert "Downloading some/model: 0 of 0 MB" in shown


def test_the_first_failure_ends_the_others_and_keeps_their_parts(tmp_path: Path, fetch: Fetch) -> None:
    with hub_of({"model-0.safetensors": b"short", "model-1.safetensors": LARGE}) as hub:
        hub.send_at_most["model-1.safetensors"] = 2 * PIECE + 500
        hub.told["model-0.safetensors"] = {"sha256": "0" * 64}
        part = part_of(tmp_path) / f"{hub.sha256('model-1.safetensors')}.microserve.incomplete"
        part.parent.mkdir(parents=True)
        part.write_bytes(LARGE[:PIECE])
        # The other file stands still at the hub until the test is over: no end of its own comes.
        assert refused(fetch(hub, MODEL, HF_HUB_DOWNLOAD_TIMEOUT="600")).startswith("ModelCorrupt: model-0.safetensors")
        kept = part.read_bytes()
    assert len(kept) >= PIECE
    assert LARGE.startswith(kept)


def test_processes_with_other_caches_but_one_library_cache_share_the_file(tmp_path: Path, fetch: Fetch) -> None:
    with hub_of({"tiny.gguf": LARGE}) as hub:
        processes = [fetch(hub, FILE, XDG_CACHE_HOME=str(tmp_path / name)) for name in ("one", "other")]
        fetched = {ended(process)[0] for process in processes}
        assert [path.read_bytes() for path in fetched] == [LARGE]
        assert hub.ranges == [("tiny.gguf", 0)]


def test_a_part_that_somebody_else_writes_is_waited_for(tmp_path: Path, fetch: Fetch) -> None:
    with hub_of({"tiny.gguf": LARGE}) as hub:
        part = begun(tmp_path, hub, LARGE[:PIECE])
        with part.open("ab") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            process = fetch(hub, FILE, shown=True)
            assert process.stderr is not None
            assert "another process is downloading it" in process.stderr.readline()
            assert not hub.ranges
            held.write(LARGE[PIECE:])
            held.flush()
            part.rename(part_of(tmp_path) / hub.sha256("tiny.gguf"))
        assert ended(process)[0].read_bytes() == LARGE
        assert not hub.ranges
        assert not list(part_of(tmp_path).glob("*.incomplete"))


def test_only_the_library_cache_needs_to_be_writable(tmp_path: Path, fetch: Fetch) -> None:
    (tmp_path / "cache").write_bytes(b"not a folder")
    with hub_of({"tiny.gguf": LARGE}) as hub:
        assert ended(fetch(hub, FILE))[0].read_bytes() == LARGE


def test_a_full_disk_is_named(tmp_path: Path, fetch: Fetch) -> None:
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({PIECE}, {PIECE}))"
    with hub_of({"tiny.gguf": LARGE}) as hub:
        reason = refused(fetch(hub, FILE, first=limit))
        assert reason.startswith(f"ModelError: The model cache {part_of(tmp_path)} cannot be written: ")
        assert ended(fetch(hub, FILE))[0].read_bytes() == LARGE
        assert hub.ranges[-1] == ("tiny.gguf", PIECE)


@pytest.mark.parametrize(("implicit", "sent"), [("0", "Bearer hf_secret"), ("1", None)])
def test_the_token_goes_to_the_hub_alone(fetch: Fetch, implicit: str, sent: str | None) -> None:
    with hub_of({"tiny.gguf": LARGE}) as hub, hub_of({"tiny.gguf": LARGE}) as other:
        hub.other = other
        process = fetch(hub, FILE, HF_TOKEN="hf_secret", HF_HUB_DISABLE_IMPLICIT_TOKEN=implicit)
        assert ended(process)[0].read_bytes() == LARGE
        assert (hub.authorizations, other.authorizations) == ([sent], [None])


def test_half_a_folder_is_no_model_without_the_hub(fetch: Fetch) -> None:
    files = {"model.gguf": LARGE, "config.json": b"{}"}
    with hub_of(files) as hub:
        ended(fetch(hub, "some/model/model.gguf"))
    assert "could not be fetched" in refused(fetch(None, MODEL))


def test_a_folder_that_lacks_a_file_is_no_model_without_the_hub(fetch: Fetch) -> None:
    with hub_of({"model.safetensors": LARGE, "config.json": b"{}"}) as hub:
        folder, _ = ended(fetch(hub, MODEL))
    assert ended(fetch(None, MODEL, HF_HUB_OFFLINE="1"))[0] == folder
    (folder / "model.safetensors").unlink()
    assert "could not be fetched" in refused(fetch(None, MODEL))


def test_an_empty_file_is_the_library_s(fetch: Fetch) -> None:
    with hub_of({"tiny.gguf": b""}) as hub:
        assert ended(fetch(hub, FILE))[0].read_bytes() == b""


@pytest.mark.parametrize("shown", [True, False])
def test_the_library_shows_what_it_fetches_itself(fetch: Fetch, shown: bool) -> None:
    told = """
import sys
import huggingface_hub
from huggingface_hub.utils.tqdm import are_progress_bars_disabled
real = huggingface_hub.snapshot_download
def snapshot_download(*arguments, **options):
    print("hidden:", are_progress_bars_disabled(), file=sys.stderr)
    return real(*arguments, **options)
huggingface_hub.snapshot_download = snapshot_download
"""
    with hub_of({"model.safetensors": LARGE, "config.json": b"{}"}) as hub:
        assert f"hidden: {not shown}" in ended(fetch(hub, MODEL, shown=shown, first=told))[1]


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
        assert "timed out" in refused(fetch(hub, MODEL, answer_s=0.2))
