"""What happened to recent requests: verbs and outcome, never text, tokens or secrets."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from services.router.errors import UnknownRequest
from services.router.values import Leg


@dataclass(frozen=True, slots=True)
class Trace:
    """One request that has ended."""

    policy: str
    legs: tuple[Leg, ...]
    code: str  # name of the canonical status code


class Traces:
    """The last ones, by the request's name; of requests with one name, the last."""

    def __init__(self, max_traces: int) -> None:
        self._max_traces = max_traces
        self._traces: OrderedDict[str, Trace] = OrderedDict()

    def add(self, request_id: str, trace: Trace) -> None:
        """Keeps it, and forgets the oldest where there are too many."""
        self._traces[request_id] = trace
        self._traces.move_to_end(request_id)
        while len(self._traces) > self._max_traces:
            self._traces.popitem(last=False)

    def get(self, request_id: str) -> Trace:
        """UnknownRequest if it was never there, has not ended or is forgotten."""
        trace = self._traces.get(request_id)
        if trace is None:
            raise UnknownRequest(f"no trace is kept of request {request_id[:128]!r}")
        return trace
