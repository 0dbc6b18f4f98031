"""The requests of one model: those that wait for their turn, and those that had it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from services.router.admission.estimate import Estimate
from services.router.admission.fair_queue import FairQueue
from services.router.admission.meter import Meter
from services.router.admission.ticket import AdmissionLimits, Capacity, Priority, Ticket

# Tokens of an answer that nobody bounded, until some of the model have been seen.
FIRST_GUESS_OUTPUT = 256.0
_OUTPUT_WEIGHT = 1 / 8  # of the newest such answer in the running mean


class Waiter:
    """A request in the queue."""

    def __init__(self, ticket: Ticket) -> None:
        self.ticket = ticket
        self.turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Line:
    """Lets in as much as the fleet can take, classes by their weights, tenants of a class alike.

    Room is of two kinds, as the work is: sequences that engines decode at once, and prompt tokens that wait to be
    computed. The second is bounded by the time that they wait, with the speed that the fleet has shown.
    """

    def __init__(self, limits: AdmissionLimits, capacity: Callable[[], Capacity], clock: Callable[[], float]) -> None:
        self._limits = limits
        self._capacity = capacity
        self._queues: dict[Priority, FairQueue[Waiter]] = {each: FairQueue() for each in Priority}
        self._served = dict.fromkeys(Priority, 0.0)  # virtual time of each class
        self._now = 0.0
        self.num_waiting = 0  # requests in all queues
        self._num_running = 0
        self._num_prompt_tokens = 0  # of those that run and have no token yet
        self._prompts = Meter(clock)
        self._admitted = Meter(clock)  # cost, while somebody waits
        self._usual_output = FIRST_GUESS_OUTPUT  # of answers that were not bounded
        self._output_token_s = Estimate()  # of time after the first token, for each token that was asked for

    @property
    def idle(self) -> bool:
        """Whether nobody runs or waits."""
        return not self._num_running and not self.num_waiting

    def num_waiting_of(self, priority: Priority) -> int:
        """Requests of a class in its queue."""
        return len(self._queues[priority])

    def has_room(self) -> bool:
        """Whether one more may begin. A fleet without engines is no reason to wait: the request is to be told."""
        capacity = self._capacity()
        if not capacity.num_engines:
            return True
        if self._num_running + capacity.others_sequences >= capacity.sequences:
            return False
        most = capacity.num_engines * self._limits.min_prompt_tokens
        rate = self._prompts.rate()
        if rate is not None:
            most = max(most, int(rate * self._limits.prompt_s))
        return self._num_prompt_tokens + capacity.others_prompt_tokens < most

    def expected_wait_s(self, ticket: Ticket) -> float:
        """Until a new request has its turn, as far as one can tell."""
        rate = self._admitted.rate()
        if rate is None:
            return 0.0
        waiting = {each for each in Priority if self._queues[each]} | {ticket.priority}
        share = ticket.priority.weight / sum(each.weight for each in waiting)
        return self._queues[ticket.priority].cost_before(ticket.tenant) / (rate * share)

    def expected_service_s(self, ticket: Ticket) -> float:
        """From its turn to its end, as far as one can tell: a time that is seldom exceeded."""
        rate = self._prompts.rate()
        prompt_s = 0.0 if rate is None else (self._num_prompt_tokens + ticket.num_prompt_tokens) / rate
        return prompt_s + ticket.expected_output(self._usual_output) * self._output_token_s.high()

    def push(self, waiter: Waiter) -> None:
        """A request waits."""
        ticket = waiter.ticket
        if not self._queues[ticket.priority]:
            self._served[ticket.priority] = max(self._served[ticket.priority], self._now)
        self._queues[ticket.priority].push(ticket.tenant, ticket.cost(self._usual_output), waiter)
        self._count_waiting()

    def discard(self, waiter: Waiter) -> None:
        """A request waits no more."""
        self._queues[waiter.ticket.priority].discard(waiter)
        self._count_waiting()

    def pump(self) -> None:
        """Gives turns while there is room."""
        while self.num_waiting and self.has_room():
            priority = min((each for each in Priority if self._queues[each]), key=self._served.__getitem__)
            waiter, cost = self._queues[priority].pop()
            self._now = self._served[priority]
            self._served[priority] += cost / priority.weight
            self._admitted.add(cost)
            self._count_waiting()
            self.begin(waiter.ticket)
            waiter.turn.set_result(None)

    def begin(self, ticket: Ticket) -> None:
        """A request runs."""
        self._num_running += 1
        self._count_prompt(ticket.num_prompt_tokens)

    def first_token(self, ticket: Ticket) -> None:
        """Its prompt has been computed."""
        self._prompts.add(ticket.num_prompt_tokens)
        self._count_prompt(-ticket.num_prompt_tokens)

    def finished(self, ticket: Ticket, num_tokens: int, output_s: float) -> None:
        """One has ended well with so many tokens, so long after the first."""
        self._output_token_s.add(output_s / ticket.expected_output(self._usual_output))
        if not ticket.max_tokens:
            self._usual_output += _OUTPUT_WEIGHT * (num_tokens - self._usual_output)

    def forget_prompt(self, ticket: Ticket) -> None:
        """It has had no token for so long that it is not the fleet's speed that it waits for."""
        self._count_prompt(-ticket.num_prompt_tokens)

    def end(self) -> None:
        """One that ran runs no more; its prompt was computed, or forgotten."""
        self._num_running -= 1

    def _count_waiting(self) -> None:
        self.num_waiting = sum(map(len, self._queues.values()))
        self._admitted.set_busy(bool(self.num_waiting))

    def _count_prompt(self, num_tokens: int) -> None:
        self._num_prompt_tokens += num_tokens
        self._prompts.set_busy(self._num_prompt_tokens > 0)
