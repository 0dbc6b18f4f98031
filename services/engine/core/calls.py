"""Which request ids are in use, and what a retry of a finished one is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from services.engine.core.api import RequestKey
from services.protocol.errors import ServiceError
from services.protocol.requests import RequestLedger
from services.protocol.timing import Timing


class Call(Protocol):
    """A verb that was taken and has not ended."""

    def cancel(self) -> None:
        """One of its callers is gone."""

    def abort(self) -> None:
        """Its owner wants an end to it."""


@dataclass(slots=True)
class Entry:
    """What a request id stands for: a live call; once it is over, what a retry is told, or None if it may try again."""

    call: Call | None
    result: Timing | ServiceError | None = None


class Calls:
    """The engine's request ids, over all verbs. Finished calls are kept as their results only."""

    def __init__(self, capacity: int) -> None:
        self._ledger: RequestLedger[Entry] = RequestLedger(capacity)

    def find(self, key: RequestKey, fingerprint: bytes) -> Entry | None:
        """What an earlier call of the same arguments became. Raises RequestIdReused if it had others."""
        return self._ledger.find(key, fingerprint)

    def live(self, key: RequestKey) -> Call | None:
        """The live call of that id."""
        entry = self._ledger.live(key)
        return entry.call if entry else None

    def begin(self, key: RequestKey, fingerprint: bytes, call: Call) -> None:
        """A call was taken."""
        self._ledger.begin(key, fingerprint, Entry(call))

    def finish(self, key: RequestKey, result: Timing | ServiceError | None = None) -> None:
        """A call is over. Unknown and finished ones are ignored."""
        entry = self._ledger.live(key)
        if entry is not None:
            entry.call, entry.result = None, result
            self._ledger.finish(key)
