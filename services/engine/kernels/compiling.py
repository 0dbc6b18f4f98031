"""Says that a start compiles kernels, which may take minutes where none are kept yet, and how long that took."""

from __future__ import annotations

import logging
import time

log = logging.getLogger(__name__)


class Compiling:
    """Time spent in the compiler, which one thread at a time enters, also for what a kernel calls."""

    def __init__(self) -> None:
        self._depth = 0
        self._begun_at = self._seconds = 0.0
        self._is_told = False

    def begun(self) -> None:
        """The compiler is entered; the first time that is told."""
        if not self._is_told:
            self._is_told = True
            log.info("compiling kernels for this processor, which takes up to some minutes, once")
        if self._depth == 0:
            self._begun_at = time.monotonic()
        self._depth += 1

    def ended(self) -> None:
        """The compiler is left."""
        self._depth -= 1
        if self._depth == 0:
            self._seconds += time.monotonic() - self._begun_at

    def report(self) -> None:
        """Tells how long it took so far, if anything was compiled."""
        if self._is_told:
            log.info("kernels were compiled", extra={"fields": {"seconds": round(self._seconds, 1)}})


COMPILING = Compiling()  # of this process
