"""What is made of files that may be replaced while a process runs."""

from __future__ import annotations

import logging
import os
import stat
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import Lock
from typing import Generic, NamedTuple, TypeVar

from prometheus_client import Counter

from services.rpc.errors import StartError

log = logging.getLogger(__name__)

RELOADS = Counter(
    "microserve_file_reloads",
    "Times that files were found changed, by what they hold (certificates, keys) and outcome: replaced, or refused for"
    " what is wrong with them.",
    ["what", "outcome"],
)

Made = TypeVar("Made")


class _Stamp(NamedTuple):
    device: int
    inode: int
    kind: int  # regular, folder, ...
    changed_ns: int
    touched_ns: int  # no program sets it: archives and copies keep the date of before
    size: int


class Reloaded(Generic[Made]):
    """What is made of some files, made anew when they have changed. Any thread may ask for it.

    While the files cannot be used, as when one of a pair has been replaced and the other not yet, what was made last
    stays.
    """

    def __init__(
        self,
        paths: Iterable[Path | None],
        make: Callable[[], Made],
        *,
        what: str = "certificates",
        rest_s: float = 0.0,
    ) -> None:
        """`make` raises StartError where the files cannot be used, and so does this.

        `what` logs and metrics call it. A text that may still be on its way into its file is left alone until that has
        rested for `rest_s`, and what could not be used is tried again as often.
        """
        self._paths = tuple(path for path in paths if path is not None)
        self._make = make
        self._what = what
        self._rest_s = rest_s
        self._lock = Lock()
        self._seen = self._look()
        self._told = ""  # why the present files are of no use
        self._tried_at = 0.0
        self._made = make()
        # Shown from the start: what begins with its first count shows no increase.
        self._num_replaced, self._num_refused = (RELOADS.labels(what, each) for each in ("replaced", "refused"))

    def latest(self) -> Made:
        """What the files make now, or the last that they did."""
        with self._lock:
            seen = self._look()
            if self._is_due(seen):
                self._make_anew(seen)
                self._seen = seen  # only now: what fails in another way is tried again too
            return self._made

    def _is_due(self, seen: tuple[_Stamp | None, ...]) -> bool:
        if seen == self._seen:
            # It may be no fault of the files.
            return bool(self._told) and time.monotonic() - self._tried_at >= self._rest_s
        looks = zip(self._paths, self._seen, seen, strict=True)
        return not any(_may_grow(path, before, now, self._rest_s) for path, before, now in looks)

    def _make_anew(self, seen: tuple[_Stamp | None, ...]) -> None:
        self._tried_at = time.monotonic()
        try:
            for path, stamp in zip(self._paths, seen, strict=True):
                # Reading it might take for ever.
                if stamp is not None and not stat.S_ISREG(stamp.kind):
                    raise StartError(f"{path} is no regular file")
            made = self._make()
        except StartError as error:
            if str(error) != self._told or seen != self._seen:
                log.warning(f"{self._what} stay as they were", extra={"fields": {"why": error}})
                self._num_refused.inc()
            self._told = str(error)
        else:
            if self._look() != seen:
                return  # it may have read some of one file and some of the next: whoever asks next looks again
            self._made, self._told = made, ""
            log.info(f"{self._what} replaced", extra={"fields": {"files": " ".join(map(str, self._paths))}})
            self._num_replaced.inc()

    def _look(self) -> tuple[_Stamp | None, ...]:
        return tuple(map(_stamp, self._paths))


def _stamp(path: Path) -> _Stamp | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    kind = stat.S_IFMT(found.st_mode)
    return _Stamp(found.st_dev, found.st_ino, kind, found.st_mtime_ns, found.st_ctime_ns, found.st_size)


def _may_grow(path: Path, before: _Stamp | None, now: _Stamp | None, rest_s: float) -> bool:
    """Whether somebody may be writing it just now: it is the file of before, or its last line has no end. One that was
    written elsewhere and renamed is whole."""
    if now is None or now == before or not stat.S_ISREG(now.kind):
        return False
    if abs(time.time() - now.changed_ns / 1e9) >= rest_s:
        return False
    return (before is not None and before[:3] == now[:3]) or not _ends_a_line(path)


def _ends_a_line(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"
    except OSError:  # empty, or not for us to read
        return False
