"""Which requests begin now, which wait and which are refused: before an engine is bothered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from services.router.admission.line import Line, Waiter
from services.router.admission.ticket import AdmissionLimits, Capacity, Priority, Ticket
from services.router.errors import InvalidRequest, Overloaded, RequestTimeout
from services.router.metrics import QUEUE_SECONDS, QUEUED, REFUSALS, REQUESTS_IN_FLIGHT
from services.router.request import ModelKey

_RETRY_S = 1.0
_LONGEST_RETRY_S = 30.0
# A prompt that takes longer is not waiting for its turn on an engine: its program or its engine hangs.
_FORGET_PROMPT_S = 30.0


class Turn:
    """A request that runs."""

    def __init__(self, line: Line, ticket: Ticket, clock: Callable[[], float]) -> None:
        self.line, self._ticket, self._clock = line, ticket, clock
        self._first_token_at: float | None = None
        self._counts_prompt = True
        self._forgetting = asyncio.get_running_loop().call_later(_FORGET_PROMPT_S, self._forget_prompt)

    def first_token(self) -> None:
        """Its prompt has been computed; only the first call counts."""
        if self._counts_prompt:
            self._counts_prompt = False
            self._first_token_at = self._clock()
            self._forgetting.cancel()
            self.line.first_token(self._ticket)
            self.line.pump()

    def finished(self, num_tokens: int) -> None:
        """It has ended well, with so many tokens; end() follows."""
        if self._first_token_at is not None:
            self.line.finished(self._ticket, num_tokens, self._clock() - self._first_token_at)

    def end(self) -> None:
        """It runs no more."""
        self._forgetting.cancel()
        if self._counts_prompt:
            self._forget_prompt()
        self.line.end()
        self.line.pump()

    def _forget_prompt(self) -> None:
        self._counts_prompt = False
        self.line.forget_prompt(self._ticket)
        self.line.pump()


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
        for priority in Priority:
            QUEUED.labels(priority.value)  # shown as 0 before anybody has waited

    def enter(self, number: int = 1) -> _Entered:
        """Counts so many requests for as long as the block runs, before anything is done for them. Overloaded,
        InvalidRequest."""
        return _Entered(self, number)

    def turn(self, ticket: Ticket) -> _AwaitedTurn:
        """Waits for the request's turn, which lasts as long as the block. Overloaded at once where it could not end
        in time, and later where it did not; RequestTimeout if its deadline passes meanwhile."""
        return _AwaitedTurn(self, ticket)

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
        REQUESTS_IN_FLIGHT.inc(number)

    def uncount(self, number: int) -> None:
        """So many that were counted are over."""
        self._num_requests -= number
        REQUESTS_IN_FLIGHT.dec(number)

    async def begin(self, ticket: Ticket) -> Turn:
        """What `turn` does when the block begins; end() follows."""
        line = self._lines.get(ticket.model)
        if line is None:
            line = self._lines[ticket.model] = Line(self._limits, lambda: self._capacity(ticket.model), self._clock)
        if ticket.follows or (not line.num_waiting and line.has_room()):
            line.begin(ticket)
        else:
            try:
                await self._wait(line, ticket)
            except BaseException:
                self._forget_idle(line, ticket.model)
                raise
        return Turn(line, ticket, self._clock)

    def end(self, turn: Turn, model: ModelKey) -> None:
        """What `turn` does when the block ends."""
        turn.end()
        self._forget_idle(turn.line, model)

    def pump(self) -> None:
        """The fleet may have more room."""
        for line in self._lines.values():
            line.pump()

    @property
    def num_waiting(self) -> int:
        """Requests that wait for their turn."""
        return sum(line.num_waiting for line in self._lines.values())

    def _forget_idle(self, line: Line, model: ModelKey) -> None:
        """A model that is gone; others keep what their speed was."""
        if line.idle and self._lines.get(model) is line and not self._capacity(model).num_engines:
            del self._lines[model]

    async def _wait(self, line: Line, ticket: Ticket) -> None:
        """Until `line` has begun the request."""
        limit_s = self._longest_wait_s(line, ticket)
        waiter = Waiter(ticket)
        line.push(waiter)
        begin, queued = self._clock(), QUEUED.labels(ticket.priority.value)
        queued.inc()
        try:
            # Not cancelled by the timeout's own passing: a turn that was given must not be lost.
            await asyncio.wait({waiter.turn}, timeout=limit_s)
        except asyncio.CancelledError:
            if waiter.turn.done():
                Turn(line, ticket, self._clock).end()
            raise
        finally:
            queued.dec()
            line.discard(waiter)
            QUEUE_SECONDS.labels(ticket.priority.value).observe(self._clock() - begin)
        if not waiter.turn.done():
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
        if line.num_waiting_of(ticket.priority) >= self._limits.max_queued:
            self._refused(ticket, "queue_full")
            raise Overloaded(
                f"{self._limits.max_queued} requests of priority {ticket.priority.value} wait already",
                retry_delay_s=self._retry_s(line, ticket),
            )
        wait_s = line.expected_wait_s(ticket)
        if wait_s > self._limits.queue_s:
            self._refused(ticket, "queue_time")
            raise Overloaded(f"the request would wait for about {wait_s:.3g} s", retry_delay_s=wait_s)
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
        return min(line.expected_wait_s(ticket) or _RETRY_S, _LONGEST_RETRY_S)

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


class _AwaitedTurn:
    """See Admission.turn."""

    __slots__ = ("_admission", "_ticket", "_turn")

    def __init__(self, admission: Admission, ticket: Ticket) -> None:
        self._admission, self._ticket = admission, ticket

    async def __aenter__(self) -> Turn:
        self._turn = await self._admission.begin(self._ticket)
        return self._turn

    async def __aexit__(self, *_: object) -> None:
        self._admission.end(self._turn, self._ticket.model)
