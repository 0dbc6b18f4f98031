"""The entry of every command, which imports the rest: Ctrl-C in the second that this takes ends it quietly."""

from __future__ import annotations

import importlib
import os
import signal
from types import FrameType

_EXIT_INTERRUPTED = 130


def enter(module: str) -> None:
    """Imports `module` and runs its main(). Until that says otherwise, Ctrl-C ends the process where it stands: nothing
    is under way that would have to be tidied up."""
    # Where it is ignored, as in the background of a script, it stays so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    importlib.import_module(module).main()


def raise_interrupts() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt, as is usual."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(_EXIT_INTERRUPTED)
