"""What is printed, as records of the log: a stream in the place of standard output."""

from __future__ import annotations

import io
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TextIO

log = logging.getLogger(__name__)

MAX_CHARACTERS = 4096  # of a record


class Printed(io.TextIOBase):
    """Each line that is written is a record, a very long one several. Any thread may write.

    A record cannot be told from others by what it says, since it is a value in it; and a log that cannot be written
    is no failure of who prints.
    """

    def __init__(self, announcements: TextIO | None) -> None:
        """`announcements`: what standard output is to who waits for the READY line."""
        super().__init__()
        self.announcements = announcements
        self._changing = threading.Lock()
        self._line = ""  # that has begun

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """As text streams have one."""
        return "utf-8"

    def writable(self) -> bool:
        """It is."""
        return True

    def fileno(self) -> int:
        """Where the log goes, for children that are to print there."""
        return sys.stderr.fileno()

    def write(self, text: str) -> int:
        """What ends no line waits for its end."""
        with self._changing:
            *whole, last = (self._line + text).split("\n")
            num_told = len(last) // MAX_CHARACTERS * MAX_CHARACTERS
            if num_told:  # it may never end
                whole.append(last[:num_told])
            self._line = last[num_told:]
        # Without the lock: a handler may print, too.
        for line in whole:
            _tell(line)
        return len(text)

    def finish(self) -> None:
        """Tells of a line without an end."""
        with self._changing:
            line, self._line = self._line, ""
        if line:
            _tell(line)


@contextmanager
def printed_as_records() -> Iterator[None]:
    """For the time of the block."""
    printed = Printed(sys.stdout)
    with redirect_stdout(printed):
        try:
            yield
        finally:
            printed.finish()


def _tell(line: str) -> None:
    for begin in range(0, max(1, len(line)), MAX_CHARACTERS):
        log.info("%s", line[begin : begin + MAX_CHARACTERS])
