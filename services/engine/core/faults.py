"""Named points where a test may hold, fail or kill an engine. Outside tests they do nothing.

prep_recv.begin, remote_send.begin, start_generate.begin     the command was taken from the inbox
prep_recv.end, remote_send.end, start_generate.end           the verb is about to be answered with success
send.layer.K                                                 layer K of a piece that is being sent was announced
step.begin, step.end                                         around every step
"""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Mapping
from typing import Protocol

_LOOK_EVERY_MS = 100


class FaultPoints(Protocol):
    """What is told of every point that the loop thread passes."""

    def reach(self, point: str) -> None:
        """May return, block, raise or not come back."""


class NoFaults:
    """Does nothing, as it should be."""

    def reach(self, point: str) -> None:
        """Returns."""


class InjectedFault(Exception):
    """Raised where a test asked for it."""


class ScriptedFaults:
    """Does what a test wrote down: POINT=ACTION pairs separated by commas.

    hold:PATH   block until somebody opens the FIFO at PATH for writing and writes or closes it, each time, or until
                something else is at PATH
    raise       raise InjectedFault
    die         SIGKILL this process

    Only to be constructed where the configuration says that this is a test.
    """

    def __init__(self, script: Mapping[str, str]) -> None:
        for point, action in script.items():
            if action not in ("raise", "die") and not action.startswith("hold:"):
                raise ValueError(f"{action!r} at {point} is not hold:PATH, raise or die")
        self._script = dict(script)

    @classmethod
    def parse(cls, text: str) -> ScriptedFaults:
        """Reads "point=action,point=action". Raises ValueError."""
        pairs = [part.partition("=") for part in text.split(",") if part]
        return cls({point.strip(): action.strip() for point, _, action in pairs})

    def reach(self, point: str) -> None:
        """Carries out what is written for the point."""
        action = self._script.get(point)
        if action == "raise":
            raise InjectedFault(point)
        if action == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif action is not None:
            _stand_at(action.removeprefix("hold:"))


def _stand_at(path: str) -> None:
    """Opening it does not wait: whoever waited there for a writer would never hear that the FIFO was replaced."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        while not poller.poll(_LOOK_EVERY_MS) and _is_at(path, descriptor):
            pass
    finally:
        os.close(descriptor)


def _is_at(path: str, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
