"""The requests of one model: those that wait for their turn, and those that had it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from services.router.admission.account import Charge
from services.router.admission.estimate import Estimate
from services.router.admission.habits import Habits
from services.router.admission.meter import Meter
from services.router.admission.prompts import Prompts
from services.router.admission.queues import Queues
from services.router.admission.ticket import AdmissionLimits, Capacity, Ticket

# Tokens of an answer that nobody bounded, until some of the model have been seen.
FIRST_GUESS_OUTPUT = 256.0
_OUTPUT_WEIGHT = 1 / 8  # of the newest such answer in the running mean


class Turn:
    """What a request has in its line: it waits for it where the block begins, if it has to, then runs until its end."""

    __slots__ = ("_first_token_at", "_has_ended", "_line", "_wait", "charges", "given", "num_tokens", "ticket")

    def __init__(self, line: Line, ticket: Ticket, wait: Callable[[Line, Turn], Awaitable[None]]) -> None:
        """`wait` returns when the line has given the turn."""
        self._line, self.ticket, self._wait = line, ticket, wait
        self.given: asyncio.Future[bool] | None = None  # if it has to wait
        self.charges: tuple[Charge, ...] = ()  # if somebody had to wait
        self.num_tokens = 0  # that its answer has; whoever runs it says so before it ends
        self._first_token_at: float | None = None
        self._has_ended = False

    async def __aenter__(self) -> Turn:
        if not self._line.begins(self):
            await self._wait(self._line, self)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.end()

    def first_token(self) -> None:
        """Its prompt has been computed; only the first call counts."""
        if self._first_token_at is None:
            self._first_token_at = self._line.first_token(self)

    def finished(self, num_tokens: int) -> None:
        """It has ended well, with so many tokens."""
        if self._first_token_at is not None and not self._has_ended:
            self._line.finished(self.ticket, num_tokens, self._first_token_at)

    def end(self) -> None:
        """It is over, at the latest with its block; only the first call counts."""
        if not self._has_ended:
            self._has_ended = True
            self._line.end(self)


class Line:
    """Lets in as much as the fleet can take, classes by their weights, tenants of a class alike.

    Room is of two kinds, as the work is: sequences that engines decode at once, and prompt tokens that wait to be
    computed. The second is bounded by the time that they wait, with the speed that the fleet has shown.
    """

    def __init__(self, limits: AdmissionLimits, capacity: Callable[[], Capacity], clock: Callable[[], float]) -> None:
        self._limits = limits
        self._capacity = capacity
        self._clock = clock
        self._queues: Queues[Turn] = Queues()
        self._habits = Habits()
        self.num_waiting = 0  # requests in all queues
        self._num_running = 0
        self._prompts = Prompts(clock, self.pump, lambda: self._capacity().num_engines)  # of those that run
        self._admitted = Meter(clock)  # cost, while somebody waits
        self._usual_output = FIRST_GUESS_OUTPUT  # of answers that were not bounded
        self._output_token_s = Estimate()  # of time after the first token, for each token that was asked for

    @property
    def idle(self) -> bool:
        """Whether nobody runs or waits."""
        return not self._num_running and not self.num_waiting

    def is_full_for(self, ticket: Ticket) -> bool:
        """Whether it must not wait: its class has as many as may, and none of a tenant with more to do than its own."""
        is_full = self._queues.num_of(ticket.priority) >= self._limits.max_queued
        return is_full and self._queues.last_behind(ticket.priority, ticket.tenant) is None

    def has_room(self) -> bool:
        """Whether one more may begin. A fleet without engines is no reason to wait: the request is to be told."""
        capacity = self._capacity()
        if not capacity.num_engines:
            return True
        if self._num_running + capacity.others_sequences >= capacity.sequences:
            return False
        num_tokens = self._prompts.num_tokens + capacity.others_prompt_tokens
        if num_tokens < capacity.num_engines * self._limits.min_prompt_tokens:
            return True
        rate = self._prompts.rate()
        return rate is not None and num_tokens < int(rate * self._limits.prompt_s)

    def least_wait_s(self, ticket: Ticket) -> float:
        """Until a new request has its turn: a time that it seldom has it before. 0 as long as one cannot tell."""
        return self._wait_s(ticket, self._admitted.fastest())

    def usual_wait_s(self, ticket: Ticket) -> float:
        """The same as it is likely, to plan by rather than to refuse by. 0 as long as one cannot tell."""
        return self._wait_s(ticket, self._admitted.rate())

    def expected_service_s(self, ticket: Ticket) -> float:
        """From its turn to its end: of its prompt a time that is seldom too long, as long as few were seen, and of its
        answer one that is seldom exceeded."""
        rate = self._prompts.fastest_rate()
        prompt_s = 0.0 if rate is None else (self._prompts.num_tokens + ticket.num_prompt_tokens) / rate
        return prompt_s + ticket.expected_output(self._usual_output) * self._output_token_s.high()

    def begins(self, turn: Turn) -> bool:
        """Lets it run, if it need not wait."""
        if turn.ticket.follows:
            if self.num_waiting:
                turn.charges = self._queues.charge(turn.ticket.priority, turn.ticket.tenant, self._cost(turn.ticket))
        elif self.num_waiting or not self.has_room():
            return False
        self._begin(turn)
        return True

    def push(self, turn: Turn) -> asyncio.Future[bool]:
        """It waits, until this is done. True: its turn is there; False: a tenant with less to do has got its place.
        Unless is_full_for() it."""
        ticket = turn.ticket
        if self._queues.num_of(ticket.priority) >= self._limits.max_queued:
            last = self._queues.last_behind(ticket.priority, ticket.tenant)
            if last is not None and last.given is not None:
                self.discard(last)
                last.given.set_result(False)
        turn.given = asyncio.get_running_loop().create_future()
        self._queues.push(ticket.priority, ticket.tenant, self._cost(ticket), turn)
        self._count_waiting()
        return turn.given

    def discard(self, turn: Turn) -> None:
        """It waits no more."""
        self._queues.discard(turn.ticket.priority, turn)
        self._count_waiting()

    def pump(self) -> None:
        """Gives turns while there is room."""
        while self.num_waiting and self.has_room():
            turn, charges = self._queues.pop()
            turn.charges = charges
            self._admitted.add(charges[0].expected)
            self._count_waiting()
            self._begin(turn)
            if turn.given is not None:
                turn.given.set_result(True)

    def first_token(self, turn: Turn) -> float | None:
        """Its prompt has been computed. When that was; None if it took so long that it was counted no more."""
        if not self._prompts.computed(turn):
            return None
        if self.num_waiting:
            self.pump()
        return self._clock()

    def finished(self, ticket: Ticket, num_tokens: int, first_token_at: float) -> None:
        """One has ended well with so many tokens."""
        expected = ticket.expected_output(self._usual_output)
        self._output_token_s.add((self._clock() - first_token_at) / expected)
        if not ticket.max_tokens:
            self._usual_output += _OUTPUT_WEIGHT * (num_tokens - self._usual_output)

    def end(self, turn: Turn) -> None:
        """It runs no more."""
        self._prompts.drop(turn)
        self._num_running -= 1
        if turn.charges:
            self._settle(turn)
        if self.num_waiting:
            self.pump()

    def _settle(self, turn: Turn) -> None:
        """Its class and its tenant pay what it has really cost, however it ended."""
        ticket = turn.ticket
        self._habits.add(ticket.tenant, ticket.expected_output(self._usual_output), turn.num_tokens)
        for charge in turn.charges:
            charge.settle(ticket.work(turn.num_tokens))

    def _wait_s(self, ticket: Ticket, rate: float | None) -> float:
        return self._queues.work_before(ticket.priority, ticket.tenant) / rate if rate else 0.0

    def _cost(self, ticket: Ticket) -> float:
        return ticket.cost(self._usual_output, self._habits.ratio(ticket.tenant))

    def _begin(self, turn: Turn) -> None:
        self._num_running += 1
        self._prompts.begin(turn, turn.ticket.num_prompt_tokens)

    def _count_waiting(self) -> None:
        self.num_waiting = len(self._queues)
        self._admitted.set_busy(bool(self.num_waiting))
