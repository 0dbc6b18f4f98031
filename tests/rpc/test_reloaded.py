"""Files that are replaced while they are in use, in whatever way. test_tls.py has certificates."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from services.rpc import reloaded
from services.rpc.errors import StartError
from services.rpc.reloaded import RELOADS, Reloaded

A_WHILE_S = 1000.0


def words(path: Path) -> Reloaded[list[str]]:
    def read() -> list[str]:
        try:
            text = path.read_text()
        except OSError as error:
            raise StartError(f"cannot read it: {error.strerror}") from None
        if not text.split():
            raise StartError("there is nothing in it")
        return text.split()

    return Reloaded([path], read, what="words", rest_s=A_WHILE_S)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "words"
    path.write_text("one two\n")
    return path


def rename(path: Path, text: str) -> None:
    beside = path.with_name("beside")
    beside.write_text(text)
    beside.rename(path)


def rest(path: Path) -> None:
    """As if nobody had written it for long enough."""
    then_s = path.stat().st_mtime - 2 * A_WHILE_S
    os.utime(path, (then_s, then_s))


def counted(outcome: str) -> float:
    return RELOADS.labels("words", outcome)._value.get()


def test_a_renamed_file_counts_at_once(path: Path) -> None:
    file = words(path)
    rename(path, "three\n")
    assert file.latest() == ["three"]
    rename(path, "four\n")
    assert file.latest() == ["four"]


def test_so_does_one_of_the_same_length_and_date(path: Path) -> None:
    """As of an archive whose files have all the same date."""
    os.utime(path, (1e9, 1e9))
    file = words(path)
    path.write_text("two one\n")
    os.utime(path, (1e9, 1e9))
    assert file.latest() == ["two", "one"]


def test_one_that_is_written_where_it_stands_counts_when_it_has_rested(path: Path) -> None:
    file, before = words(path), counted("replaced")
    for text in ("", "thr", "three\n", "three four\n"):
        path.write_text(text)
        assert file.latest() == ["one", "two"]
    rest(path)
    assert file.latest() == ["three", "four"]
    assert counted("replaced") == before + 1


def test_so_does_a_new_one_whose_last_line_has_no_end(path: Path) -> None:
    file = words(path)
    rename(path, "three four f")
    assert file.latest() == ["one", "two"]
    rest(path)
    assert file.latest() == ["three", "four", "f"]


def test_one_from_the_future_is_not_waited_for(path: Path) -> None:
    file = words(path)
    path.write_text("three\n")
    os.utime(path, (2e10, 2e10))
    assert file.latest() == ["three"]


def empty(path: Path) -> None:
    rename(path, "\n")


def into_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def into_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def into_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("spoil", [empty, Path.unlink, into_folder, into_fifo, into_device])
def test_one_that_is_of_no_use_changes_nothing_until_it_is(
    path: Path, spoil: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    file, before = words(path), counted("refused")
    spoil(path)
    for _ in range(3):
        assert file.latest() == ["one", "two"]
    assert caplog.text.count("words stay as they were") == 1
    assert counted("refused") == before + 1
    if path.is_dir():
        path.rmdir()
    rename(path, "three\n")
    assert file.latest() == ["three"]


def test_each_that_is_of_no_use_is_told_of(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, before = words(path), counted("refused")
    for _ in range(2):
        empty(path)
        for _ in range(2):
            file.latest()
    assert caplog.text.count("words stay as they were") == counted("refused") - before == 2


def test_it_is_not_read_again_and_again_while_it_is_of_no_use(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, now_s = 0, 0.0

    def read() -> int:
        nonlocal reads
        reads += 1
        if reads == 2:
            raise StartError("no descriptor is left")
        return reads

    monkeypatch.setattr(reloaded.time, "monotonic", lambda: now_s)
    file = Reloaded([path], read, what="words", rest_s=A_WHILE_S)
    rename(path, "three\n")
    assert [file.latest() for _ in range(5)] == [1] * 5
    assert reads == 2
    now_s += A_WHILE_S
    assert file.latest() == 3


def test_one_that_changes_while_it_is_read_is_read_again(path: Path) -> None:
    texts = iter(["", "three\n", "four\n", ""])

    def read() -> str:
        text = path.read_text()
        if following := next(texts):
            rename(path, following)
        return text

    file = Reloaded([path], read, what="words", rest_s=A_WHILE_S)
    rename(path, "two\n")
    assert file.latest() == "one two\n"
    assert file.latest() == "one two\n"
    assert file.latest() == "four\n"
