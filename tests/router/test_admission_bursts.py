"""Who is refused at once for what is known of the fleet's speed, and who is not, on a clock that jumps."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from services.router.admission.admission import Admission
from services.router.admission.ticket import AdmissionLimits, Capacity, Priority, Ticket
from services.router.errors import Overloaded
from services.rpc.virtual_loop import run
from tests.router.test_admission import NO_LIMITS, TICKET, admission_of, all_of, work


def test_one_that_cannot_begin_in_time_is_refused_at_once() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        admission, done = admission_of(1, replace(NO_LIMITS, queue_s=8.0)), []
        works = [asyncio.create_task(work(admission, TICKET, 0.01, done, "early")) for _ in range(800)]
        await asyncio.sleep(2.505)  # long enough to know how fast it goes
        with pytest.raises(Overloaded, match="deadline") as caught:
            await work(admission, replace(TICKET, deadline=loop.time() + 3), 0.01, done, "late")
        assert caught.value.retry_delay_s == pytest.approx(5.5, rel=0.2)
        assert loop.time() == 2.505
        await work(admission, replace(TICKET, deadline=loop.time() + 60), 0.01, done, "patient")
        await asyncio.gather(*works)
        assert len(done) == 801

    run(main())


@pytest.mark.parametrize("first_s", [0.2, 0.9, 3])
def test_a_burst_is_not_refused_for_how_long_the_first_of_it_take(first_s: float) -> None:
    """All that is seen of a cold fleet is that its first answers took a while."""

    async def main() -> None:
        admission, done = admission_of(1, replace(NO_LIMITS, queue_s=5.0)), []
        first = asyncio.create_task(work(admission, TICKET, first_s, done, "first"))
        await asyncio.sleep(0)
        works = [asyncio.create_task(work(admission, TICKET, 0.01, done, "")) for _ in range(30)]
        await asyncio.sleep(first_s + 0.005)
        works += [asyncio.create_task(work(admission, TICKET, 0.01, done, "")) for _ in range(30)]
        await asyncio.gather(first, *works)
        assert len(done) == 61

    run(main())


def test_a_burst_is_not_refused_because_the_router_stood_still() -> None:
    async def main() -> None:
        loop, done = asyncio.get_running_loop(), list[str]()
        stopped_s = 0.0
        limits = AdmissionLimits()
        admission = Admission(limits, lambda _: Capacity(1, 1000), lambda: loop.time() + stopped_s)

        async def quick() -> None:
            async with admission.turn(TICKET) as turn:
                await asyncio.sleep(0.005)
                turn.first_token()
            done.append("")

        works = []
        for number in range(400):
            works.append(asyncio.create_task(quick()))
            await asyncio.sleep(0.003)
            if number == 200:
                stopped_s = 10.0
                works += [asyncio.create_task(quick()) for _ in range(300)]
        await asyncio.gather(*works)
        assert len(done) == 700

    run(main())


def test_a_few_of_a_higher_class_do_not_have_a_lower_one_refused() -> None:
    async def main() -> None:
        admission, done = admission_of(1, replace(NO_LIMITS, queue_s=5.0)), []
        low = replace(TICKET, priority=Priority.LOW)
        works = [asyncio.create_task(work(admission, low, 0.01, done, "low")) for _ in range(300)]
        await asyncio.sleep(2)
        works.append(asyncio.create_task(work(admission, replace(TICKET, priority=Priority.HIGH), 0.01, done, "high")))
        await asyncio.sleep(0)
        works.append(asyncio.create_task(work(admission, low, 0.01, done, "low")))
        await asyncio.gather(*works)
        assert len(done) == 302

    run(main())


def test_nobody_is_told_to_come_again_in_hours() -> None:
    async def main() -> None:
        admission, done = admission_of(1, replace(NO_LIMITS, queue_s=700.0)), []
        works = [asyncio.create_task(work(admission, TICKET, 1, done, "quick")) for _ in range(4)]
        works += [asyncio.create_task(work(admission, TICKET, 300, done, "slow")) for _ in range(300)]
        await asyncio.sleep(303.5)
        with pytest.raises(Overloaded, match=r"would wait for 7\d\d s or more") as caught:
            await work(admission, TICKET, 1, done, "late")
        assert caught.value.retry_delay_s == 30
        assert await all_of(works)

    run(main())


def test_who_is_refused_is_told_to_come_again_when_its_turn_is_likely() -> None:
    async def main() -> None:
        admission, done = admission_of(1, replace(NO_LIMITS, max_queued=4)), []
        works = [asyncio.create_task(work(admission, TICKET, 1.2, done, "")) for _ in range(5)]
        await asyncio.sleep(2.5)
        works += [asyncio.create_task(work(admission, TICKET, 1.2, done, "")) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="wait already") as caught:
            await work(admission, TICKET, 1.2, done, "late")
        assert caught.value.retry_delay_s == pytest.approx(4 * 1.2, rel=0.3)  # and no sixth of it
        await asyncio.gather(*works)

    run(main())


def test_nobody_is_told_to_come_again_in_milliseconds() -> None:
    async def main() -> None:
        admission, done = admission_of(1, replace(NO_LIMITS, max_queued=4)), []
        works = []
        for _ in range(200):
            works.append(asyncio.create_task(work(admission, TICKET, 0.01, done, "")))
            await asyncio.sleep(0.01 if len(works) > 4 else 0)
        with pytest.raises(Overloaded, match="wait already") as caught:
            await work(admission, TICKET, 0.01, done, "late")
        assert caught.value.retry_delay_s == 0.5
        await asyncio.gather(*works)

    run(main())


class Engines:
    """Each computes all prompts that wait for it together: a step takes 20 ms, and 11,450 tokens a second."""

    def __init__(self, number: int) -> None:
        self._locks = [asyncio.Lock() for _ in range(number)]
        self._waiting: list[list[int]] = [[] for _ in range(number)]
        self._next = 0

    async def compute(self, num_tokens: int) -> None:
        mine, self._next = self._next, (self._next + 1) % len(self._locks)
        waiting = self._waiting[mine]
        waiting.append(num_tokens)
        async with self._locks[mine]:
            if waiting is self._waiting[mine]:  # nobody has computed it with its own
                self._waiting[mine] = []
                await asyncio.sleep(0.02 + sum(waiting) / 11_450)


async def one(admission: Admission, engines: Engines, ticket: Ticket) -> float:
    """When its prompt was computed."""
    async with admission.turn(ticket) as turn:
        await engines.compute(ticket.num_prompt_tokens)
        turn.first_token()
    return asyncio.get_running_loop().time()


async def one_by_one(admission: Admission, engines: Engines, ticket: Ticket) -> None:
    for _ in range(60):
        await one(admission, engines, ticket)


def test_prompts_that_come_one_at_a_time_tell_how_fast_the_fleet_is() -> None:
    async def main() -> None:
        admission, engines, loop = admission_of(1), Engines(1), asyncio.get_running_loop()
        await one_by_one(admission, engines, replace(TICKET, num_prompt_tokens=20_000))
        running = asyncio.create_task(work(admission, TICKET, 60, [], ""))
        await asyncio.sleep(0)
        now = loop.time()
        with pytest.raises(Overloaded, match="deadline"):
            await one(admission, engines, replace(TICKET, num_prompt_tokens=100_000, deadline=now + 3))
        assert loop.time() == now
        await running

    run(main())


@pytest.mark.parametrize("num_engines", [1, 4])
@pytest.mark.parametrize("num_tokens", [100, 20_000])
def test_nobody_is_refused_because_prompts_had_come_one_at_a_time(num_engines: int, num_tokens: int) -> None:
    """What is let in where nothing is known of the deadline is not refused with the deadline that it kept."""

    async def main(left_s: float) -> float:
        admission, engines = admission_of(2 * num_engines, num_engines=num_engines), Engines(num_engines)
        ticket = replace(TICKET, num_prompt_tokens=num_tokens)
        await one_by_one(admission, engines, ticket)
        now = asyncio.get_running_loop().time()
        burst = [asyncio.create_task(one(admission, engines, ticket)) for _ in range(2 * num_engines)]
        await asyncio.sleep(0)
        late = replace(TICKET, num_prompt_tokens=20_000, deadline=now + left_s)
        ended = await one(admission, engines, late)
        await asyncio.gather(*burst)
        return ended - now

    kept_s = run(main(float("inf")))
    assert run(main(kept_s + 1e-6)) == pytest.approx(kept_s)
