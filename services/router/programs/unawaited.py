"""Sends that a program called without `await`: what they were to bring never comes."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass

from services.protocol.ranges import TokenRange
from services.router.errors import PolicyFailed
from services.router.fleet.reservation import Reservation
from services.router.programs.stack import calling_line


class _Begin:
    """To be called when the send begins. The send's coroutine has it, and takes it along when it is dropped."""

    __slots__ = ("__weakref__", "_send")

    def __init__(self, send: _Send) -> None:
        self._send = send

    def __call__(self) -> None:
        self._send.begun = True


@dataclass(slots=True, eq=False)
class _Send:
    """A send that a program called, at that line."""

    kv: Reservation
    tokens: TokenRange
    line: int
    begin: weakref.ref[_Begin] | None = None
    begun: bool = False

    def never_begins(self) -> bool:
        """Whether it was dropped before it began."""
        return not self.begun and (self.begin is None or self.begin() is None)


class Unawaited:
    """The sends of one run. That one was dropped proves no mistake: the program may have closed it, or failed while it
    made the next one. So it counts only where something waits for what no other send brings either."""

    def __init__(self, spec: str) -> None:
        self._spec = spec  # of the program
        self._sends: list[_Send] = []

    def sends(self, kv: Reservation, tokens: TokenRange) -> Callable[[], None]:
        """A send was called; what comes back is to be called when it begins, and kept by nobody else."""
        line = calling_line(sys._getframe(1))
        if line is None:
            return lambda: None
        send = _Send(kv, tokens, line)
        begin = _Begin(send)
        send.begin = weakref.ref(begin)
        self._sends.append(send)
        return begin

    def generates(self, kv: Reservation) -> None:
        """A sequence is about to wait for this reservation to be filled. PolicyFailed if it would for ever."""
        lost = self._lost(_Send.never_begins, kv)
        if lost is not None:
            raise PolicyFailed(f"policy {self._spec} called remote_send at line {lost.line} without await")

    def remark(self) -> str:
        """On a program that came to no end: the send that it forgot to await, if it did."""
        lost = self._lost(lambda send: not send.begun)
        return "" if lost is None else f"; it called remote_send at line {lost.line} without await"

    def _lost(self, is_lost: Callable[[_Send], bool], kv: Reservation | None = None) -> _Send | None:
        """The first such send that no other one makes up for."""
        lost = [send for send in self._sends if is_lost(send) and kv in (None, send.kv)]
        others = [send for send in self._sends if not is_lost(send)] if lost else []
        return next((send for send in lost if send.tokens and not _makes_up(others, send)), None)


def _makes_up(others: list[_Send], lost: _Send) -> bool:
    return any(other.kv is lost.kv and other.tokens.overlaps(lost.tokens) for other in others)
