"""How many answers are in time at how much load, on a clock that jumps; the engines are simulated ones."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import pytest

from services.router.admission.admission import Admission
from services.router.admission.ticket import AdmissionLimits, Capacity, Ticket
from services.router.errors import RouterError
from services.rpc.virtual_loop import run
from tests.router.test_admission import KEY, NO_LIMITS

PREFILL_RATE, TOKEN_S, SLOTS = 2000.0, 0.02, 16  # tokens a second, seconds a token, sequences of an engine
PROMPT, OUTPUT = 200, 100
TTFT_GOAL_S = 3.0
DEADLINE_S = 4.0  # of the whole answer, which takes 2.1 s at least
SECONDS = 60


@dataclass
class StubEngine:
    """Prompts one after another, sequences beside one another, queues without a bound."""

    slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(SLOTS))
    prefill: asyncio.Lock = field(default_factory=asyncio.Lock)
    num_sequences: int = 0

    async def generate(self, ticket: Ticket, first_token: Callable[[], None]) -> None:
        self.num_sequences += 1
        try:
            async with self.slots:
                async with self.prefill:
                    await asyncio.sleep(ticket.num_prompt_tokens / PREFILL_RATE)
                first_token()
                await asyncio.sleep(ticket.max_tokens * TOKEN_S)
        finally:
            self.num_sequences -= 1


async def goodput(
    rate: float, limits: AdmissionLimits, *, with_deadlines: bool = False, sequences: int = 2 * SLOTS
) -> float:
    """Answers a second whose first token came in time, and whose last one came before their deadline if they have one,
    for requests that arrive at random."""
    rng, loop = random.Random(3), asyncio.get_running_loop()
    engines = [StubEngine() for _ in range(2)]
    admission = Admission(limits, lambda _: Capacity(2, sequences), loop.time)
    good = 0

    async def client() -> None:
        nonlocal good
        arrival, first = loop.time(), []
        deadline = arrival + DEADLINE_S if with_deadlines else float("inf")
        ticket = Ticket(KEY, PROMPT, OUTPUT, deadline=deadline)
        with suppress(RouterError):
            async with admission.turn(ticket) as turn:

                def first_token() -> None:
                    turn.first_token()
                    first.append(loop.time() - arrival)

                await min(engines, key=lambda each: each.num_sequences).generate(ticket, first_token)
                turn.finished(ticket.max_tokens)
                good += first[0] <= TTFT_GOAL_S and loop.time() <= deadline and arrival < SECONDS

    clients = []
    while loop.time() < SECONDS:
        clients.append(asyncio.create_task(client()))
        await asyncio.sleep(rng.expovariate(rate))
    await asyncio.gather(*clients)
    return good / SECONDS


LIMITS = AdmissionLimits(max_requests=10**6, queue_s=2.0)


@pytest.mark.parametrize("with_deadlines", [True, False])
def test_at_three_times_the_peak_goodput_stays(with_deadlines: bool) -> None:
    rates = [8, 11, 14, 17, 20, 48]
    measured = [run(goodput(rate, LIMITS, with_deadlines=with_deadlines)) for rate in rates]
    peak = max(measured)
    assert peak > 10, measured  # 2 engines x 16 slots / 2.1 s is about 15 a second
    assert measured[-1] >= 0.9 * peak, measured


def test_without_bounds_it_would_not() -> None:
    """The check of the check: the same engines collapse when everybody is let in."""
    assert run(goodput(48, NO_LIMITS, sequences=10**9)) < 5
