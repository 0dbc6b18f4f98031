"""A cached folder appears whole, once, whatever happens to who makes it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from services.engine.model.cache import cache_root, ensure_folder
from services.engine.model.errors import ModelError


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_root() == Path("/somewhere/microserve")
    for unset in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert cache_root() == tmp_path / ".cache" / "microserve"


def test_many_want_it_and_one_makes_it(tmp_path: Path) -> None:
    target, makers, waiters = tmp_path / "a" / "b", [], []
    release, entered = threading.Event(), threading.Event()

    def fill(folder: Path) -> None:
        makers.append(folder)
        entered.set()
        release.wait(10)
        assert not target.exists()
        (folder / "file").write_text("whole")

    def wait() -> None:
        waiters.append(1)
        if len(waiters) == 3:
            release.set()

    first = threading.Thread(target=ensure_folder, args=(target, fill, wait))
    first.start()
    entered.wait(10)
    others = [threading.Thread(target=ensure_folder, args=(target, fill, wait)) for _ in range(3)]
    for thread in others:
        thread.start()
    for thread in (first, *others):
        thread.join(10)
    assert len(makers) == 1
    assert (target / "file").read_text() == "whole"


def test_a_failure_leaves_nothing_and_the_next_call_succeeds(tmp_path: Path) -> None:
    target = tmp_path / "folder"

    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure_folder(target, fail)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    ensure_folder(target, lambda folder: (folder / "file").touch())
    assert [path.name for path in target.iterdir()] == ["file"]


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match=r"model cache .* cannot be written"):
        ensure_folder(tmp_path / "file" / "folder", lambda folder: None)
