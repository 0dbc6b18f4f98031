"""Same request id, same arguments: the memory that makes retries harmless."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

from services.protocol.errors import RequestIdReused

E = TypeVar("E")


class RequestLedger(Generic[E]):
    """Remembers calls by key with a fingerprint of their arguments and an entry that says what became of them.

    Live calls are all remembered; of finished ones the newest `capacity`.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._live: dict[Hashable, tuple[bytes, E]] = {}
        self._finished: OrderedDict[Hashable, tuple[bytes, E]] = OrderedDict()

    def find(self, key: Hashable, fingerprint: bytes) -> E | None:
        """The entry of an earlier call with this key, or None. Raises RequestIdReused if its arguments differ."""
        known = self._live.get(key) or self._finished.get(key)
        if known is None:
            return None
        if known[0] != fingerprint:
            raise RequestIdReused("this request id was used before with other arguments")
        return known[1]

    def live(self, key: Hashable) -> E | None:
        """The entry of a call that is not finished, whatever its arguments."""
        known = self._live.get(key)
        return known[1] if known else None

    def begin(self, key: Hashable, fingerprint: bytes, entry: E) -> None:
        """Remembers a new call; a finished one of the same key is forgotten."""
        self._finished.pop(key, None)
        self._live[key] = (fingerprint, entry)

    def finish(self, key: Hashable) -> None:
        """Marks a call as finished; it is remembered until newer ones push it out. Unknown keys are ignored."""
        known = self._live.pop(key, None)
        if known is None:
            return
        self._finished[key] = known
        if len(self._finished) > self._capacity:
            self._finished.popitem(last=False)
