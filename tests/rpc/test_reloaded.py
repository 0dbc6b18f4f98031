"""Files that are replaced while they are in use, in whatever way. test_tls.py has certificates."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from threading import Event

import pytest

from services.rpc import reloaded
from services.rpc.errors import StartError
from services.rpc.reloaded import RELOADS, STALE, Looks, Reloaded
from tests.fakes import PATIENCE_S

A_WHILE_S = 1000.0


class Clock:
    """Stands still until it is told."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def rest(self) -> None:
        self.now_s += A_WHILE_S


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(reloaded.time, "monotonic", lambda: clock.now_s)
    return clock


def words(path: Path, rest_s: float = 0.0) -> Reloaded[list[str]]:
    def read() -> list[str]:
        try:
            text = path.read_text()
        except OSError as error:
            raise StartError(f"cannot read it: {error.strerror}") from None
        if not text.split():
            raise StartError("there is nothing in it")
        return text.split()

    return Reloaded([path], read, what="words", rest_s=rest_s)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "words"
    path.write_text("one two\n")
    return path


def rename(path: Path, text: str) -> None:
    beside = path.with_name("beside")
    beside.write_text(text)
    beside.rename(path)


def counted(outcome: str) -> float:
    return RELOADS.labels("words", outcome)._value.get()


def stale() -> float:
    return STALE.labels("words")._value.get()


def test_a_file_that_need_not_rest_counts_at_once(path: Path) -> None:
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


def written(path: Path, text: str) -> None:
    path.write_text(text)


def moved_aside(path: Path, text: str) -> None:
    path.rename(path.with_name("aside"))
    path.write_text(text)


def from_the_future(path: Path, text: str) -> None:
    path.write_text(text)
    os.utime(path, (2e10, 2e10))


def from_the_past(path: Path, text: str) -> None:
    path.write_text(text)
    os.utime(path, (1e9, 1e9))


@pytest.mark.parametrize("put", [written, rename, moved_aside, from_the_future, from_the_past])
def test_one_that_may_still_be_written_counts_when_it_has_been_seen_at_rest(
    path: Path, clock: Clock, put: Callable[[Path, str], None]
) -> None:
    """However it comes, and whatever its date or its last byte."""
    file, before, was_stale = words(path, A_WHILE_S), counted("replaced"), stale()
    for text in ("", "thr", "three\n", "three four f"):
        clock.rest()
        put(path, text)
        for _ in range(2):
            assert file.latest() == ["one", "two"]
        assert stale() == was_stale + 1
    clock.rest()
    assert file.last() == ["one", "two"]  # nobody has looked
    assert file.latest() == ["three", "four", "f"]
    assert (counted("replaced"), stale()) == (before + 1, was_stale)


def test_one_that_never_rests_is_told_of_once(path: Path, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    file = words(path, A_WHILE_S)
    for number in range(30):
        path.write_text(f"{number}\n")
        assert file.latest() == ["one", "two"]
        assert caplog.text.count("words wait for files") == int(number >= 10)
        clock.rest()
    file.look()
    assert file.last() == ["29"]


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
    file, before, was_stale = words(path), counted("refused"), stale()
    spoil(path)
    for _ in range(3):
        assert file.latest() == ["one", "two"]
    assert caplog.text.count("words stay as they were") == 1
    assert (counted("refused"), stale()) == (before + 1, was_stale + 1)
    if path.is_dir():
        path.rmdir()
    rename(path, "three\n")
    assert file.latest() == ["three"]
    assert stale() == was_stale


def test_each_that_is_of_no_use_is_told_of(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, before = words(path), counted("refused")
    for _ in range(2):
        empty(path)
        for _ in range(2):
            file.latest()
    assert caplog.text.count("words stay as they were") == counted("refused") - before == 2


def test_it_is_not_read_again_and_again_while_it_is_of_no_use(path: Path, clock: Clock) -> None:
    reads = 0

    def read() -> int:
        nonlocal reads
        reads += 1
        if reads == 2:
            raise StartError("no descriptor is left")
        return reads

    file = Reloaded([path], read, what="words", rest_s=A_WHILE_S)
    rename(path, "three\n")
    file.look()
    clock.rest()
    for _ in range(10):
        assert file.latest() == 1
        assert reads == 2
        clock.rest()
    assert file.latest() == 3


def test_one_that_changes_while_it_is_read_is_read_again(path: Path) -> None:
    texts = iter(["", "three\n", "four\n", ""])

    def read() -> str:
        text = path.read_text()
        if following := next(texts):
            rename(path, following)
        return text

    file = Reloaded([path], read, what="words")
    rename(path, "two\n")
    assert file.latest() == "one two\n"
    assert file.latest() == "one two\n"
    assert file.latest() == "four\n"


def test_a_look_that_fails_keeps_nobody_from_the_next(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = iter([1])
    broken, file = Reloaded([path], lambda: next(made)), words(path)
    rename(path, "three\n")
    looks = Looks((broken, file), every_s=A_WHILE_S)
    looks.look()
    assert (broken.last(), file.last()) == (1, ["three"])
    assert "could not be looked at" in caplog.text


def test_looks_go_on_beside_everything_else_until_they_are_closed(path: Path) -> None:
    looked = Event()

    class Watched(Reloaded[str]):
        def look(self) -> None:
            super().look()
            looked.set()

    file = Watched([path], path.read_text, what="words")
    rename(path, "three\n")
    looks = Looks((file,), every_s=1e-3)
    looks.start()
    assert looked.wait(PATIENCE_S)
    assert file.last() == "three\n"
    looks.close()
    looks._thread.join(PATIENCE_S)
    assert not looks._thread.is_alive()
