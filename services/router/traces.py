"""What happened to recent requests: verbs and outcome, never text, tokens or secrets."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from services.router.cost.decision import Decision
from services.router.errors import UnknownRequest
from services.router.values import Leg


@dataclass(frozen=True, slots=True)
class Trace:
    """One request that has ended. Times in seconds from its arrival."""

    policy: str
    legs: tuple[Leg, ...]
    code: str  # name of the canonical status code
    duration_s: float = 0.0
    first_token_s: float | None = None  # None if there was none
    output_tokens: int = 0
    decision: Decision | None = None  # None if its program did not ask for the cheapest placement

    @property
    def per_token_s(self) -> float | None:
        """Mean time between output tokens after the first; None with fewer than two."""
        if self.first_token_s is None or self.output_tokens < 2:
            return None
        return (self.duration_s - self.first_token_s) / (self.output_tokens - 1)


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
