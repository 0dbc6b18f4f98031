"""Shares of tokens that clients get who always ask for more than there is, on a clock that jumps, whatever was expected
of their answers. Ratios are to hold within a third, or as told: what differs is chance, and what runs at the end."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

import pytest

from services.router.admission.admission import Admission
from services.router.admission.ticket import AdmissionLimits, Capacity, Priority, Ticket
from services.router.request import ModelKey
from services.rpc.virtual_loop import run

pytestmark = pytest.mark.slow

LIMITS = AdmissionLimits(queue_s=1e9, max_queued=10**9, prompt_s=1e9, min_prompt_tokens=10**9)
TOKEN_S = 0.02


@dataclass(frozen=True)
class Client:
    """One tenant's requests, which it sends so many at once."""

    length: Callable[[random.Random], int]  # of its answers
    max_tokens: int = 0
    number: int = 8
    priority: Priority = Priority.NORMAL
    is_cut: bool = False  # it goes away when it has had that
    others: tuple[int, int] = (0, 0)  # how many answers follow the first to each request, and how long they are


def always(length: int) -> Callable[[random.Random], int]:
    return lambda _: length


def shares(sequences: int, seconds: float, **clients: Client) -> dict[str, float]:
    """Tokens that each has got, over what all have; the first tenth of the time does not count."""
    got: Counter[str] = Counter()

    async def main() -> None:
        loop, rng = asyncio.get_running_loop(), random.Random(5)
        admission = Admission(LIMITS, lambda _: Capacity(1, sequences), loop.time)

        async def answer(ticket: Ticket, length: int, is_cut: bool) -> None:
            with suppress(asyncio.CancelledError):
                async with admission.turn(ticket) as turn:
                    turn.first_token()
                    await asyncio.sleep(length * TOKEN_S)
                    got[ticket.tenant] += length if loop.time() > seconds / 10 else 0
                    turn.num_tokens = length
                    if is_cut:
                        raise asyncio.CancelledError
                    turn.finished(length)

        async def ask(tenant: str, client: Client) -> None:
            ticket = Ticket(ModelKey("m", b"d", b"t"), 1, client.max_tokens, client.priority, tenant)
            number, length = client.others
            while loop.time() < seconds:
                await answer(ticket, client.length(rng), client.is_cut)
                others = [answer(replace(ticket, follows=True), length, client.is_cut) for _ in range(number)]
                await asyncio.gather(*others)

        await asyncio.gather(*(ask(name, client) for name, client in clients.items() for _ in range(client.number)))

    run(main())
    return {name: got[name] / got.total() for name in clients}


@pytest.mark.parametrize(
    ("long", "short"),
    [
        (Client(always(2000)), Client(always(50))),
        (Client(always(2000), 4000), Client(always(50), 4000)),
        (Client(always(2000), is_cut=True), Client(always(50), is_cut=True)),
        (Client(always(50), 4000), Client(always(50), 50)),
        (Client(always(2000)), Client(always(2000), 2000)),
    ],
    ids=["unbounded", "bounded", "cut off", "bounded by far too much", "one of them bounded"],
)
def test_tenants_get_equal_shares_whatever_was_expected(long: Client, short: Client) -> None:
    seen = shares(4, 4000, long=long, short=short)
    assert 0.75 < seen["long"] / seen["short"] < 1.33


def test_a_tenant_with_one_request_at_a_time_is_not_taken_for_a_new_one_each_time() -> None:
    seen = shares(1, 4000, long=Client(always(2000), number=1), a=Client(always(50), number=1), b=Client(always(50)))
    assert 0.25 < seen["long"] < 0.42


def erratic(rng: random.Random) -> int:
    return 4000 if rng.random() < 0.1 else 50


def varied(rng: random.Random) -> int:
    return 1 + int(rng.expovariate(1 / 300))


@pytest.mark.parametrize(("lengths", "mean"), [(erratic, 445), (varied, 300)], ids=["erratic", "varied"])
def test_lengths_that_nobody_can_know_cost_a_tenant_little(lengths: Callable[[random.Random], int], mean: int) -> None:
    """Within a half: refunds are bounded, and with many answers at once some are lost."""
    seen = shares(16, 10_000, known=Client(always(mean), mean, 32), unknown=Client(lengths, 4000, 32))
    assert 0.67 < seen["unknown"] / seen["known"] < 1.5


@pytest.mark.parametrize(("high", "normal"), [(2000, 100), (100, 2000)])
@pytest.mark.parametrize("max_tokens", [0, 4000])
def test_classes_share_by_weight_whatever_was_expected(high: int, normal: int, max_tokens: int) -> None:
    seen = shares(
        4,
        10_000,
        high=Client(always(high), max_tokens, priority=Priority.HIGH),
        normal=Client(always(normal), max_tokens),
    )
    assert 3 < seen["high"] / seen["normal"] < 5.33  # 16 : 4


def test_several_answers_are_paid_whichever_of_them_are_long() -> None:
    """What is the first one's alone says nothing of the others'."""
    seen = shares(8, 2000, several=Client(always(1), 1000, 4, others=(7, 1000)), one=Client(always(100), 100, 16))
    assert 0.67 < seen["several"] / seen["one"] < 1.5


def test_a_tenant_cannot_make_itself_cheap() -> None:
    """Its answers are far shorter than it says until it is believed, and then as long as they may be."""
    numbers = iter(range(10**9))

    def feigned(_: random.Random) -> int:
        return 1 if next(numbers) % 40 < 20 else 4000

    seen = shares(4, 10_000, feigning=Client(feigned, 4000), honest=Client(always(200), 200))
    assert seen["feigning"] / seen["honest"] < 1.33
