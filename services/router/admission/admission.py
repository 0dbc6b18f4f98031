"""Which requests begin now, which wait and which are refused: before an engine is bothered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from weakref import WeakSet

from services.router.admission.line import Line, Turn
from services.router.admission.ticket import AdmissionLimits, Capacity, Priority, Ticket
from services.router.errors import InvalidRequest, Overloaded, RequestTimeout
from services.router.metrics import QUEUE_SECONDS, QUEUED, REFUSALS, REQUESTS_IN_FLIGHT
from services.router.request import ModelKey

# Who comes again sooner than this only asks more often.
_SHORTEST_RETRY_S = 0.5
_RETRY_S = 1.0  # where nothing is known
_LONGEST_RETRY_S = 30.0

_ALL: WeakSet[Admission] = WeakSet()
REQUESTS_IN_FLIGHT.set_function(lambda: sum(each.num_requests for each in _ALL))


class Admission:
    """Bounds what runs by what the fleet can take, so that overload is refused and not turned into latency."""

    def __init__(
        self,
        limits: AdmissionLimits,
        capacity: Callable[[ModelKey], Capacity],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._capacity = capacity
        self._clock = clock
        self._num_requests = 0
        self._lines: dict[ModelKey, Line] = {}
        self._one = _Entered(self, 1)
        _ALL.add(self)
        for priority in Priority:
            QUEUED.labels(priority.value)  # shown as 0 before anybody has waited

    def enter(self, number: int = 1) -> _Entered:
        """Counts so many requests for as long as the block runs, before anything is done for them. Overloaded,
        InvalidRequest."""
        return self._one if number == 1 else _Entered(self, number)

    def turn(self, ticket: Ticket) -> Turn:
        """Waits for the request's turn, which lasts as long as the block. Overloaded at once where it could not end
        in time, and later where it did not; RequestTimeout if its deadline passes meanwhile."""
        return Turn(self._lines.get(ticket.model) or self._begin_line(ticket.model), ticket, self._wait)

    def count(self, number: int) -> None:
        """So many more requests. Overloaded, InvalidRequest."""
        most = self._limits.max_requests
        if number > most:
            raise InvalidRequest(f"{number} answers at once are more than the {most} that this router takes")
        if self._num_requests + number > most:
            REFUSALS.labels("none", "max_requests").inc()
            what = f"of {most} requests, as many as this router takes, {self._num_requests} wait or run"
            raise Overloaded(what, retry_delay_s=_RETRY_S)
        self._num_requests += number

    def uncount(self, number: int) -> None:
        """So many that were counted are over."""
        self._num_requests -= number

    def pump(self) -> None:
        """The fleet may have more room."""
        for line in self._lines.values():
            line.pump()

    @property
    def num_requests(self) -> int:
        """Requests under way: those that wait and those that run."""
        return self._num_requests

    @property
    def num_waiting(self) -> int:
        """Requests that wait for their turn."""
        return sum(line.num_waiting for line in self._lines.values())

    def _begin_line(self, model: ModelKey) -> Line:
        """That of a model which has none. Lines of models that are gone end; others keep what their speed was."""
        self._lines = {
            key: line for key, line in self._lines.items() if not line.idle or self._capacity(key).num_engines
        }
        line = self._lines[model] = Line(self._limits, partial(self._capacity, model), self._clock)
        return line

    async def _wait(self, line: Line, turn: Turn) -> None:
        """Until `line` has begun the request."""
        ticket = turn.ticket
        limit_s = self._longest_wait_s(line, ticket)
        given = line.push(turn)
        begin, queued = self._clock(), QUEUED.labels(ticket.priority.value)
        queued.inc()
        try:
            # Not cancelled by the timeout's own passing: a turn that was given must not be lost.
            await asyncio.wait({given}, timeout=limit_s)
        except asyncio.CancelledError:
            if given.done() and given.result():
                line.end(turn)
            raise
        finally:
            queued.dec()
            line.discard(turn)
            QUEUE_SECONDS.labels(ticket.priority.value).observe(self._clock() - begin)
        if given.done() and not given.result():
            raise self._full(line, ticket)
        if not given.done():
            if asyncio.get_running_loop().time() >= ticket.deadline:
                raise self._too_late(ticket)
            self._refused(ticket, "queue_time")
            raise Overloaded(
                f"the request's turn did not come within {limit_s:.3g} s", retry_delay_s=self._retry_s(line, ticket)
            )

    def _longest_wait_s(self, line: Line, ticket: Ticket) -> float:
        """How long it may wait. Overloaded if it should not even begin to, RequestTimeout if it came too late."""
        left_s = ticket.deadline - asyncio.get_running_loop().time()
        if left_s <= 0:
            raise self._too_late(ticket)
        if line.is_full_for(ticket):
            raise self._full(line, ticket)
        wait_s = line.least_wait_s(ticket)
        if wait_s > self._limits.queue_s:
            self._refused(ticket, "queue_time")
            raise Overloaded(
                f"the request would wait for {wait_s:.3g} s or more", retry_delay_s=self._retry_s(line, ticket)
            )
        in_time_s = left_s - line.expected_service_s(ticket)
        if wait_s > in_time_s:
            self._refused(ticket, "deadline")
            raise Overloaded(
                "the request could not be answered before its deadline", retry_delay_s=self._retry_s(line, ticket)
            )
        # Nor does one begin that cannot end in time any more: its work would be for nothing.
        return min(self._limits.queue_s, max(0.0, in_time_s))

    @staticmethod
    def _retry_s(line: Line, ticket: Ticket) -> float:
        return min(max(line.usual_wait_s(ticket) or _RETRY_S, _SHORTEST_RETRY_S), _LONGEST_RETRY_S)

    def _full(self, line: Line, ticket: Ticket) -> Overloaded:
        self._refused(ticket, "queue_full")
        what = f"{self._limits.max_queued} requests of priority {ticket.priority.value} wait already"
        return Overloaded(what, retry_delay_s=self._retry_s(line, ticket))

    def _too_late(self, ticket: Ticket) -> RequestTimeout:
        self._refused(ticket, "deadline")
        return RequestTimeout("the request's time was over before its turn came")

    @staticmethod
    def _refused(ticket: Ticket, reason: str) -> None:
        REFUSALS.labels(ticket.priority.value, reason).inc()


class _Entered:
    """See Admission.enter. No generator, for every request enters: making one a context costs three times as much."""

    __slots__ = ("_admission", "_number")

    def __init__(self, admission: Admission, number: int) -> None:
        self._admission, self._number = admission, number

    def __enter__(self) -> None:
        self._admission.count(self._number)

    def __exit__(self, *_: object) -> None:
        self._admission.uncount(self._number)
