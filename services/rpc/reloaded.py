"""What is made of files that may be replaced while a process runs."""

from __future__ import annotations

import logging
import os
import stat
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

from prometheus_client import Counter, Gauge

from services.rpc.errors import StartError

log = logging.getLogger(__name__)

RELOADS = Counter(
    "microserve_file_reloads",
    "Times that files were found changed, by what they hold (certificates, keys) and outcome: replaced, or refused for"
    " what is wrong with them.",
    ["what", "outcome"],
)

STALE = Gauge(
    "microserve_file_stale",
    "Sets of files, by what they hold, that are not what is used: they are of no use, or have not come to rest.",
    ["what"],
)

Made = TypeVar("Made")


class _Stamp(NamedTuple):
    device: int
    inode: int
    kind: int  # regular, folder, ...
    changed_ns: int
    touched_ns: int  # no program sets it: archives and copies keep the date of before
    size: int


# Of each file, in order; None: there is none.
_Stamps: TypeAlias = "tuple[_Stamp | None, ...]"


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

        `what` logs and metrics call it. A change counts once no look within `rest_s` has found another: a text may
        still be on its way into its file. What could not be used is tried again after ten times as long.
        """
        self._paths = tuple(path for path in paths if path is not None)
        self._make = make
        self._what = what
        self._rest_s = rest_s
        self._lock = Lock()
        self._used = self._found = self._stamps()
        self._found_at = self._waits_since = time.monotonic()
        self._told = ""  # why the present files are of no use
        self._told_waiting = self._is_stale = False
        self._tried_at = 0.0
        self._made = make()
        # Shown from the start: what begins with its first count shows no increase.
        self._num_replaced, self._num_refused = (RELOADS.labels(what, each) for each in ("replaced", "refused"))
        self._num_stale = STALE.labels(what)

    def latest(self) -> Made:
        """What the files make now, or the last that they did."""
        self.look()
        return self.last()

    def last(self) -> Made:
        """What the files made when they were looked at last. Reads nothing."""
        return self._made

    def look(self) -> None:
        """Makes it anew if the files have changed; may take as long as reading them does."""
        with self._lock:
            stamps, now_s = self._stamps(), time.monotonic()
            if self._is_due(stamps, now_s):
                self._make_anew(stamps, now_s)
                self._used = stamps  # only now: what fails in another way is tried again too
            self._show(stamps, now_s)

    def _is_due(self, stamps: _Stamps, now_s: float) -> bool:
        if stamps != self._found:
            self._found, self._found_at = stamps, now_s
        if stamps == self._used:
            # It may be no fault of the files.
            return bool(self._told) and now_s - self._tried_at >= 10 * self._rest_s
        return now_s - self._found_at >= self._rest_s

    def _show(self, stamps: _Stamps, now_s: float) -> None:
        if stamps == self._used:
            self._waits_since, self._told_waiting = now_s, False
        elif now_s - self._waits_since >= 10 * self._rest_s and not self._told_waiting:
            self._told_waiting = True
            log.warning(
                f"{self._what} wait for files that do not come to rest",
                extra={"fields": {"files": " ".join(map(str, self._paths))}},
            )
        is_stale = bool(self._told) or stamps != self._used
        self._num_stale.inc(is_stale - self._is_stale)
        self._is_stale = is_stale

    def _make_anew(self, stamps: _Stamps, now_s: float) -> None:
        self._tried_at = now_s
        try:
            for path, stamp in zip(self._paths, stamps, strict=True):
                # Reading it might take for ever.
                if stamp is not None and not stat.S_ISREG(stamp.kind):
                    raise StartError(f"{path} is no regular file")
            made = self._make()
        except StartError as error:
            if str(error) != self._told or stamps != self._used:
                log.warning(f"{self._what} stay as they were", extra={"fields": {"why": error}})
                self._num_refused.inc()
            self._told = str(error)
        else:
            if self._stamps() != stamps:
                return  # it may have read some of one file and some of the next: whoever asks next looks again
            self._made, self._told = made, ""
            log.info(f"{self._what} replaced", extra={"fields": {"files": " ".join(map(str, self._paths))}})
            self._num_replaced.inc()

    def _stamps(self) -> _Stamps:
        return tuple(map(_stamp, self._paths))


def _stamp(path: Path) -> _Stamp | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    kind = stat.S_IFMT(found.st_mode)
    return _Stamp(found.st_dev, found.st_ino, kind, found.st_mtime_ns, found.st_ctime_ns, found.st_size)


class Looks:
    """Looks at files again and again, on a thread of its own: a disk or a mount that does not answer holds up nobody
    else."""

    def __init__(self, files: Iterable[Reloaded[Any]], *, every_s: float) -> None:
        self._files = tuple(files)
        self._every_s = every_s
        self._closed = Event()
        # It never keeps the process from ending.
        self._thread = Thread(target=self._run, name="looks at files", daemon=True)

    def start(self) -> None:
        """Begins, if there is anything to look at."""
        if self._files:
            self._thread.start()

    def close(self) -> None:
        """No look begins from now on."""
        self._closed.set()

    def look(self) -> None:
        """Once, at all of them."""
        for file in self._files:
            try:
                file.look()
            except Exception:  # what this is may pass, and the other files have nothing to do with it
                log.exception("files could not be looked at")

    def _run(self) -> None:
        while not self._closed.wait(self._every_s):
            self.look()
