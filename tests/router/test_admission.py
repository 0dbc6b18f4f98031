"""Who begins, who waits and who is refused, on a clock that jumps; the engines are simulated ones."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable
from dataclasses import replace

import pytest

from services.router.admission.admission import Admission
from services.router.admission.ticket import AdmissionLimits, Capacity, Priority, Ticket
from services.router.errors import Overloaded, RequestTimeout
from services.router.metrics import REQUESTS_IN_FLIGHT
from services.router.request import ModelKey
from services.rpc.virtual_loop import run

KEY = ModelKey("m", b"d", b"t")
TICKET = Ticket(KEY, 100, 100)
NO_LIMITS = AdmissionLimits(queue_s=1e9, max_queued=10**9, prompt_s=1e9, min_prompt_tokens=10**9)


def admission_of(sequences: int, limits: AdmissionLimits = NO_LIMITS, num_engines: int = 1) -> Admission:
    loop = asyncio.get_running_loop()
    return Admission(limits, lambda _: Capacity(num_engines, sequences), loop.time)


async def work(admission: Admission, ticket: Ticket, seconds: float, done: list[str], name: str) -> None:
    async with admission.turn(ticket) as turn:
        turn.first_token()
        await asyncio.sleep(seconds)
    done.append(name)


async def all_of(works: list[Awaitable[None]]) -> list[BaseException | None]:
    return await asyncio.gather(*works, return_exceptions=True)


def test_more_than_fit_wait_and_all_have_their_turn() -> None:
    async def main() -> None:
        admission, done = admission_of(2), []
        await all_of([work(admission, TICKET, 1, done, str(i)) for i in range(6)])
        assert done == list("012345")
        assert asyncio.get_running_loop().time() == pytest.approx(3)
        assert admission.num_waiting == 0

    run(main())


def test_prompts_that_are_not_computed_fill_the_fleet() -> None:
    async def main() -> None:
        admission = admission_of(100, replace(NO_LIMITS, prompt_s=0.0, min_prompt_tokens=250))
        begun: list[int] = []

        async def one(number: int) -> None:
            async with admission.turn(TICKET) as turn:
                begun.append(number)
                await asyncio.sleep(1)
                turn.first_token()
                await asyncio.sleep(100)

        tasks = [asyncio.create_task(one(i)) for i in range(6)]
        await asyncio.sleep(0.5)
        assert len(begun) == 3  # the third finds 200 of 250
        await asyncio.sleep(1)
        assert len(begun) == 6
        await asyncio.gather(*tasks)

    run(main())


def test_a_request_whose_time_is_over_is_not_told_to_come_again() -> None:
    async def main() -> None:
        admission, done = admission_of(1), []
        running = asyncio.create_task(work(admission, TICKET, 1, done, "first"))
        await asyncio.sleep(0.5)
        for deadline in (0.25, 0.5):
            with pytest.raises(RequestTimeout):
                await work(admission, replace(TICKET, deadline=deadline), 1, done, "late")
        await running
        assert done == ["first"]

    run(main())


def test_a_prompt_that_is_never_computed_does_not_fill_it_for_ever() -> None:
    async def main() -> None:
        admission, done = admission_of(100, replace(NO_LIMITS, prompt_s=0.0, min_prompt_tokens=1)), []

        async def hang() -> None:
            async with admission.turn(TICKET):
                await asyncio.sleep(1000)

        hanging = asyncio.create_task(hang())
        await asyncio.sleep(0)
        await work(admission, TICKET, 0, done, "next")
        assert asyncio.get_running_loop().time() == pytest.approx(30)
        hanging.cancel()
        await asyncio.gather(hanging, return_exceptions=True)

    run(main())


def test_classes_share_by_weight_and_none_starves() -> None:
    async def main() -> None:
        admission, done = admission_of(1), []
        works = [work(admission, replace(TICKET, priority=p), 1, done, p.value) for p in Priority for _ in range(50)]
        await all_of(works)
        assert Counter(done[1:22]) == {"high": 16, "normal": 4, "low": 1}

    run(main())


def test_tenants_share_alike_however_many_requests_they_send() -> None:
    async def main() -> None:
        admission, done = admission_of(1), []
        works = [work(admission, replace(TICKET, tenant="many"), 1, done, "many") for _ in range(100)]
        works += [work(admission, replace(TICKET, tenant="few"), 1, done, "few") for _ in range(5)]
        await all_of(works)
        assert Counter(done[:11])["few"] == 5

    run(main())


def test_a_tenant_that_fills_the_queue_keeps_no_other_out_of_it() -> None:
    async def main() -> None:
        admission, done = admission_of(1, replace(NO_LIMITS, max_queued=4)), []

        def begin(tenant: str) -> asyncio.Task[None]:
            return asyncio.create_task(work(admission, replace(TICKET, tenant=tenant), 1, done, tenant))

        many = [begin("many") for _ in range(5)]
        await asyncio.sleep(0.5)
        few = [begin("few") for _ in range(3)]
        with pytest.raises(Overloaded, match="4 requests of priority normal wait already"):
            await work(admission, replace(TICKET, tenant="many"), 1, done, "late")
        ends = await all_of([*many, *few])
        # Two places of four for each; those who waited last among many have lost theirs.
        assert [type(end) for end in ends] == [*[type(None)] * 3, Overloaded, Overloaded, *[type(None)] * 2, Overloaded]
        assert Counter(done) == {"many": 3, "few": 2}
        assert admission.num_waiting == 0

    run(main())


def test_who_waits_too_long_is_refused_by_whose_limit_it_was() -> None:
    async def main() -> None:
        admission, done = admission_of(1, replace(NO_LIMITS, queue_s=5.0)), []
        loop = asyncio.get_running_loop()
        first = asyncio.create_task(work(admission, TICKET, 100, done, "first"))
        await asyncio.sleep(0)
        hurried, patient = await all_of(
            [
                work(admission, replace(TICKET, deadline=loop.time() + 2), 1, done, "hurried"),
                work(admission, TICKET, 1, done, "patient"),
            ]
        )
        assert isinstance(hurried, RequestTimeout)
        assert isinstance(patient, Overloaded)
        assert loop.time() == pytest.approx(5)
        assert admission.num_waiting == 0
        await first

    run(main())


def test_a_full_queue_refuses_at_once_and_other_classes_not() -> None:
    async def main() -> None:
        admission, done = admission_of(1, replace(NO_LIMITS, max_queued=2)), []
        works = [asyncio.create_task(work(admission, TICKET, 1, done, "w")) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="2 requests of priority normal") as caught:
            await work(admission, TICKET, 1, done, "w")
        assert caught.value.retry_delay_s is not None
        await work(admission, replace(TICKET, priority=Priority.HIGH), 1, done, "high")
        await asyncio.gather(*works)

    run(main())


def test_cancelling_at_any_moment_loses_no_turn() -> None:
    async def main(after_s: float) -> None:
        admission, done = admission_of(1), []
        works = [asyncio.create_task(work(admission, TICKET, 1, done, str(i))) for i in range(4)]
        await asyncio.sleep(after_s)
        works[1].cancel()
        works[2].cancel()
        await asyncio.gather(*works, return_exceptions=True)
        await work(admission, TICKET, 1, done, "after")
        assert done[-1] == "after"
        assert "3" in done
        assert admission.num_waiting == 0

    for after_s in (0.0, 0.5, 1.0, 1.5, 2.0):  # at 1.0 its turn is given in the same moment
        run(main(after_s))


@pytest.mark.parametrize(("num_tokens", "order"), [(10, "ubuubb"), (256, "ububub"), (1000, "ubbbuu")])
def test_an_answer_that_nobody_bounds_costs_what_such_answers_had_of_late(num_tokens: int, order: str) -> None:
    async def main() -> None:
        admission, done = admission_of(1), []
        unbounded, bounded = Ticket(KEY, 1, tenant="u"), Ticket(KEY, 1, 300, tenant="b")
        for _ in range(40):
            async with admission.turn(unbounded) as turn:
                turn.first_token()
                turn.finished(num_tokens)
        first = asyncio.create_task(work(admission, TICKET, 1, [], "running"))
        await asyncio.sleep(0)
        await all_of([first, *(work(admission, each, 1, done, each.tenant) for each in 3 * [unbounded, bounded])])
        assert "".join(done) == order

    run(main())


def test_an_answer_that_nobody_bounds_is_not_expected_to_leave_the_context() -> None:
    ticket = Ticket(KEY, 100, room=20)
    assert ticket.expected_output(256) == 20
    assert ticket.expected_output(5) == 5
    assert ticket.expected_output(0) == 1
    assert replace(ticket, max_tokens=300).expected_output(5) == 20
    assert ticket.cost(256) == 120


def test_choices_of_a_request_that_has_begun_do_not_queue() -> None:
    async def main() -> None:
        admission, done = admission_of(1), []
        first = asyncio.create_task(work(admission, TICKET, 5, done, "first"))
        await asyncio.sleep(0)
        await work(admission, replace(TICKET, follows=True), 1, done, "choice")
        assert done == ["choice"]
        await first

    run(main())


def test_all_requests_of_a_process_are_told_together() -> None:
    async def main() -> None:
        def told() -> float:
            return REQUESTS_IN_FLIGHT.collect()[0].samples[0].value

        before, busy, idle = told(), admission_of(1), admission_of(1)
        with busy.enter(2), idle.enter():
            assert told() == before + 3
        assert told() == before

    run(main())


def test_a_turn_can_be_over_before_its_block() -> None:
    async def main() -> None:
        admission, done = admission_of(1), []

        async def slow_reader() -> None:
            async with admission.turn(TICKET) as turn:
                turn.end()
                await asyncio.sleep(100)
                turn.finished(100)

        reader = asyncio.create_task(slow_reader())
        await asyncio.sleep(0)
        works = [asyncio.create_task(work(admission, TICKET, 150, done, name)) for name in "ab"]
        await asyncio.sleep(120)  # the reader's block ends while a's turn lasts
        assert reader.done()
        await asyncio.sleep(90)
        assert done == ["a"]
        await asyncio.gather(*works)
        assert done == ["a", "b"]
        assert asyncio.get_running_loop().time() == pytest.approx(300)

    run(main())


def test_without_engines_nobody_waits_to_be_told() -> None:
    async def main() -> None:
        admission, done = admission_of(0, num_engines=0), []
        await work(admission, TICKET, 0, done, "told")
        assert done == ["told"]

    run(main())


def test_what_is_known_of_a_model_that_is_gone_is_forgotten() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        served: set[ModelKey] = set()
        admission = Admission(NO_LIMITS, lambda key: Capacity(1, 1) if key in served else Capacity(), loop.time)
        for number in range(100):
            served.clear()
            served |= {KEY, KEY._replace(digest=b"%d" % number)}
            for key in served:
                await work(admission, replace(TICKET, model=key), 1, [], "")
        assert set(admission._lines) <= served | {KEY._replace(digest=b"98")}
        assert KEY in admission._lines

    run(main())


def test_a_model_without_engines_is_not_forgotten_while_requests_of_it_run() -> None:
    async def main() -> None:
        loop, done = asyncio.get_running_loop(), list[str]()
        capacity = {KEY: Capacity(1, 1)}
        admission = Admission(NO_LIMITS, lambda key: capacity.get(key, Capacity()), loop.time)
        running = asyncio.create_task(work(admission, TICKET, 2, done, "running"))
        waiting = asyncio.create_task(work(admission, TICKET, 2, done, "waiting"))
        await asyncio.sleep(1)
        capacity.clear()
        await work(admission, replace(TICKET, model=KEY._replace(name="other")), 0.5, done, "other")
        capacity[KEY] = Capacity(1, 1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.25):  # one runs, so there is no room
                await work(admission, TICKET, 0, done, "no")
        await asyncio.gather(running, waiting)
        assert done == ["other", "running", "waiting"]

    run(main())
