"""Sources share the copying threads fairly."""

from __future__ import annotations

import threading
from collections.abc import Callable

from services.kvtransfer.copier import Copier

PATIENCE_S = 60.0


class Source:
    """So many copies; each appends the source's name to `log`."""

    def __init__(self, name: str, count: int, log: list[str], done: threading.Semaphore) -> None:
        self._name, self._left, self._log, self._done = name, count, log, done

    def take(self) -> Callable[[], None] | None:
        if not self._left:
            return None
        self._left -= 1
        return self._copy

    def more(self, count: int) -> None:
        self._left += count

    def _copy(self) -> None:
        self._log.append(self._name)
        self._done.release()


class Blocker:
    """One copy that holds its thread until it is told to go on."""

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        self._taken = False

    def take(self) -> Callable[[], None] | None:
        if self._taken:
            return None
        self._taken = True
        return self._copy

    def _copy(self) -> None:
        self.begun.set()
        assert self.go_on.wait(PATIENCE_S)


def test_a_long_source_does_not_delay_a_short_one() -> None:
    copier, log, done = Copier(1), list[str](), threading.Semaphore(0)
    blocker, long, short = Blocker(), Source("long", 100, log, done), Source("short", 2, log, done)
    copier.submit(blocker)
    assert blocker.begun.wait(PATIENCE_S)
    copier.submit(long)
    copier.submit(short)
    blocker.go_on.set()
    for _ in range(102):
        assert done.acquire(timeout=PATIENCE_S)
    assert log[:5] == ["long", "short", "long", "short", "long"]
    copier.close()


def test_a_source_that_has_more_is_asked_again() -> None:
    copier, log, done = Copier(2), list[str](), threading.Semaphore(0)
    source = Source("a", 1, log, done)
    for _ in range(3):
        copier.submit(source)
        assert done.acquire(timeout=PATIENCE_S)
        source.more(1)
    copier.close()
    assert log == ["a"] * 3


def test_threads_work_at_the_same_time() -> None:
    copier = Copier(2)
    one, two = Blocker(), Blocker()
    copier.submit(one)
    copier.submit(two)
    assert one.begun.wait(PATIENCE_S)
    assert two.begun.wait(PATIENCE_S)
    one.go_on.set()
    two.go_on.set()
    copier.close()


def test_close_waits_for_the_copy_under_way() -> None:
    copier, blocker = Copier(1), Blocker()
    copier.submit(blocker)
    assert blocker.begun.wait(PATIENCE_S)
    closer = threading.Thread(target=copier.close)
    closer.start()
    blocker.go_on.set()
    closer.join(PATIENCE_S)
    assert not closer.is_alive()
