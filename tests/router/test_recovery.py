"""Engines that fail under a request: it goes on elsewhere, and no token is repeated or lost."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from services.engine.errors import EngineDraining, PromptTooLong, StepFailed
from services.kvtransfer.errors import ChecksumMismatch, PushStalled
from services.protocol.errors import (
    LayoutMismatch,
    PromptMismatch,
    ReservationGone,
    ServiceError,
    StaleEpoch,
    UnknownReservation,
)
from services.router import errors
from services.router.errors import EngineLost, NoEngine, PolicyFailed, RequestTimeout, SlowConsumer
from services.router.fleet.recovery import Remedy, remedy
from services.router.metrics import FALLBACKS, RETRIES
from tests.fakes import FakeBug, FakeEngine, FakeError, FakeLoss, FakeModel, Fault
from tests.router.harness import (
    PROMPT,
    Running,
    failing,
    first_tokens,
    model,
    other_tokens,
    request,
    running,
    script,
    verbs,
)
from tests.router.test_faults import PLACES

LOSS = "the connection broke"
SEEDED = {"temperature": 1.0, "seed": 7}


def engines_of(names: str, fake_model: FakeModel | None = None, **options: Any) -> list[FakeEngine]:
    peers: dict[str, FakeEngine] = {}
    return [FakeEngine(fake_model or model(), name, peers=peers, **options) for name in names]


def break_all(suite: Running, method: str, error: ServiceError, **fields: Any) -> None:
    for engine in suite.engines:
        engine.faults[method] = Fault(error, **fields)


async def until_there_are(num_sequences: int, engines: Sequence[FakeEngine]) -> None:
    """Waits until the engines have so many together; each of them tells of its own changes only."""

    def reached() -> bool:
        return sum(len(engine.sequences) for engine in engines) == num_sequences

    waits = [asyncio.create_task(engine.until(reached)) for engine in engines]
    done, pending = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in pending:
        wait.cancel()
    for wait in done:
        wait.result()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (FakeLoss(LOSS), Remedy.ELSEWHERE),
        (EngineLost("gone"), Remedy.ELSEWHERE),
        (NoEngine("none"), Remedy.ELSEWHERE),
        (EngineDraining("bye"), Remedy.ELSEWHERE),
        (FakeError("no pages"), Remedy.ELSEWHERE),
        (StepFailed("numbers"), Remedy.ELSEWHERE),
        (PushStalled("slow"), Remedy.ELSEWHERE),
        (ReservationGone("expired"), Remedy.AGAIN),
        (UnknownReservation("forgotten"), Remedy.AGAIN),
        (StaleEpoch("restarted"), Remedy.AGAIN),
        (LayoutMismatch("other pages"), Remedy.WITHOUT_TRANSFER),
        (ChecksumMismatch("a frame"), Remedy.WITHOUT_TRANSFER),
        (PromptTooLong("to be set aside"), Remedy.WITHOUT_TRANSFER),
        (errors.PromptTooLong("for any engine"), Remedy.NONE),
        (PromptMismatch("other tokens"), Remedy.NONE),
        (FakeBug("broken"), Remedy.NONE),
        (SlowConsumer("asleep"), Remedy.NONE),
        (PolicyFailed("raised"), Remedy.NONE),
        (RequestTimeout("late"), Remedy.NONE),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, ServiceError) else value.value,
)
def test_every_error_has_its_remedy(error: ServiceError, expected: Remedy) -> None:
    assert remedy(error) is expected


ERRORS = (FakeLoss(LOSS), FakeError("there is no room"), ReservationGone("it expired"))


@pytest.mark.parametrize(
    ("place", "error"),
    [
        (place, error)
        for place in PLACES
        for error in ERRORS
        # An engine that refuses for lack of room has not reserved.
        if not (place == "prep_recv_reserved" and isinstance(error, FakeError))
    ],
)
async def test_a_leg_that_fails_is_tried_elsewhere(place: str, error: ServiceError) -> None:
    index, method, late, after_tokens = PLACES[place]
    async with running(engines=engines_of("abcd"), policy="disaggregated") as suite:
        fault = suite.engines[2 * index].faults[method] = Fault(error, late, after_tokens, times=1)
        answer = await suite.generate(**SEEDED)
        assert fault.reached.is_set()
        assert list(answer.token_ids) == model().generate(PROMPT, 8, seed=7)
        assert answer.usage.output_token_count == 8
        assert answer.policy == "disaggregated"


@pytest.mark.parametrize("policy", ["data_parallel", "disaggregated", "context_aware:0", "balanced:0.5"])
async def test_an_engine_that_dies_under_its_streams_is_replaced(policy: str) -> None:
    """Twenty at once, greedy and seeded: each client gets every token once."""
    async with running(3, policy=policy) as suite:
        for engine in suite.engines:
            engine.gate.clear()
        asked = [
            asyncio.create_task(suite.generate((*PROMPT, i), max_tokens=30, **(SEEDED if i % 2 else {})))
            for i in range(10, 30)
        ]
        await until_there_are(20, suite.engines)
        victim = max(suite.engines, key=lambda each: len(each.sequences))
        suite.engines.remove(victim)
        await victim.stop()
        for engine in suite.engines:
            engine.gate.set()
        for i, answer in enumerate(await asyncio.gather(*asked), start=10):
            assert list(answer.token_ids) == model().generate((*PROMPT, i), 30, seed=7 if i % 2 else None)


async def test_what_was_generated_counts_as_output_where_the_stream_goes_on() -> None:
    text = "one two three four five"
    async with running(2, fake_model=script(text)) as suite:
        suite.first.faults["StartGenerate"] = Fault(FakeLoss(LOSS), after_tokens=3)
        answer = await suite.generate(logprobs=0, max_tokens=40, min_tokens=4, presence_penalty=1.0)
        assert answer.text == text
        assert len(answer.logprobs) == len(answer.token_ids) == answer.usage.output_token_count
        assert answer.usage.prompt_token_count == len(PROMPT)
        first, second = (engine.called("StartGenerate")[0] for engine in suite.engines)
        assert list(second.prompt_token_ids) == [*PROMPT, *answer.token_ids[:3]]
        assert second.prompt_token_count == len(PROMPT)
        assert second.sampling == first.sampling
        assert verbs(answer) == [
            ("start_generate", "a", 0, len(PROMPT)),
            ("start_generate", "b", 0, len(PROMPT) + 3),
        ]


async def test_pieces_of_several_tokens_go_on_whole() -> None:
    async with running(2) as suite:
        for engine in suite.engines:
            engine.tokens_at_once = 3
        suite.first.faults["StartGenerate"] = Fault(FakeLoss(LOSS), after_tokens=6)
        answer = await suite.generate(max_tokens=20)
        assert list(answer.token_ids) == model().generate(PROMPT, 20)
        [second] = suite.engines[1].called("StartGenerate")
        assert list(second.prompt_token_ids) == [*PROMPT, *answer.token_ids[:6]]


async def test_who_sends_what_was_generated_is_told_that_it_is_output() -> None:
    async with running(3, policy="disaggregated") as suite:
        suite.engines[1].faults["StartGenerate"] = Fault(FakeLoss(LOSS), after_tokens=6)
        suite.engines[2].faults["StartGenerate"] = Fault(FakeLoss(LOSS), after_tokens=6)
        answer = await suite.generate(max_tokens=20)
        assert list(answer.token_ids) == model().generate(PROMPT, 20)
        sent = suite.first.called("RemoteSend")
        assert len(sent) >= 2
        assert len(sent[-1].prompt_token_ids) > len(PROMPT)
        assert {each.prompt_token_count for each in sent} == {len(PROMPT)}


async def test_a_stop_string_is_found_across_the_break() -> None:
    async with running(2, fake_model=script("never say stopword again")) as suite:
        suite.first.faults["StartGenerate"] = Fault(FakeLoss(LOSS), after_tokens=len("never say stop"))
        answer = await suite.generate(stop=["stopword"], max_tokens=40)
        assert answer.text == "never say "


async def test_a_random_seed_of_the_routers_is_kept() -> None:
    async with running(2) as suite:
        suite.first.faults["StartGenerate"] = Fault(FakeLoss(LOSS), after_tokens=3)
        answer = await suite.generate(temperature=1.0)
        seed = suite.engines[1].called("StartGenerate")[0].sampling.seed
        assert list(answer.token_ids) == model().generate(PROMPT, 8, seed=seed)


async def test_a_sequence_that_an_engine_cancels_by_itself_goes_on_elsewhere() -> None:
    async with running(2) as suite:
        first = suite.first
        fault = first.faults["StartGenerate"] = Fault(after_tokens=3)
        asked = asyncio.create_task(suite.generate())
        await fault.reached.wait()
        first.cancel_sequences()
        answer = await asked
        assert list(answer.token_ids) == model().generate(PROMPT, 8)
        assert answer.finish_reason == 2
        assert [leg.engine for leg in answer.legs] == ["a", "b"]


async def test_a_refusal_of_every_engine_reaches_the_client_at_once() -> None:
    async with running(3) as suite:
        break_all(suite, "StartGenerate", FakeError("there is no room", retry_delay_s=7.0))
        with failing("RESOURCE_EXHAUSTED", "NO_PAGES") as caught:
            await suite.generate()
        assert caught.value.retry_delay_s == 7.0
        assert [len(engine.called("StartGenerate")) for engine in suite.engines] == [1, 1, 1]


async def test_a_request_that_breaks_every_engine_is_given_up() -> None:
    async with running(2, max_retries=2) as suite:
        break_all(suite, "StartGenerate", FakeLoss(LOSS))
        with failing("UNAVAILABLE", "UNAVAILABLE"):
            await suite.generate()
        assert sum(len(engine.called("StartGenerate")) for engine in suite.engines) == 3


async def test_the_number_of_retries_begins_again_with_every_token() -> None:
    async with running(2, max_retries=1) as suite:
        before = RETRIES.labels("continued", "UNAVAILABLE")._value.get()
        break_all(suite, "StartGenerate", FakeLoss(LOSS), after_tokens=1)
        answer = await suite.generate(max_tokens=4)
        assert list(answer.token_ids) == model().generate(PROMPT, 4)
        assert RETRIES.labels("continued", "UNAVAILABLE")._value.get() == before + 4


async def test_a_stream_waits_for_its_only_engine_to_come_back() -> None:
    async with running(1) as suite:
        old = suite.first
        old.faults["StartGenerate"] = Fault(after_tokens=3)
        call = suite.stream()
        before = await first_tokens(call, 3)
        await old.stop()
        await suite.until(lambda: not suite.router.serving)
        with failing("UNAVAILABLE", "NO_ENGINE"):
            await suite.generate()  # a request without tokens is refused at once
        new = FakeEngine(model(), "a")
        await new.start(old.address)
        assert before + (await other_tokens(call))[0] == model().generate(PROMPT, 8)
        suite.engines[:] = [new]
        await suite.idle()
        await new.stop()


async def test_a_stream_does_not_wait_for_ever() -> None:
    async with running(1, stranded_timeout=0.0) as suite:
        fault = suite.first.faults["StartGenerate"] = Fault(after_tokens=3)
        asked = asyncio.create_task(suite.generate())
        await fault.reached.wait()
        await suite.first.stop()
        with failing("UNAVAILABLE", "NO_ENGINE"):
            await asked
        suite.engines.clear()


async def test_full_engines_are_waited_for_by_a_stream_that_has_begun() -> None:
    async with running(5, max_retries=1) as suite:
        suite.first.faults["StartGenerate"] = Fault(FakeLoss(LOSS), after_tokens=3, times=1)
        for engine in suite.engines[1:]:
            engine.faults["StartGenerate"] = Fault(FakeError("full"), times=1)
        answer = await suite.generate()
        assert [leg.engine for leg in answer.legs[:5]] == list("abcde")
        assert list(answer.token_ids) == model().generate(PROMPT, 8)


async def test_pages_that_do_not_fit_mean_data_parallel_counted() -> None:
    counter = FALLBACKS.labels("disaggregated", "LAYOUT_MISMATCH")
    before = counter._value.get()
    async with running(2, policy="disaggregated") as suite:
        suite.first.faults["RemoteSend"] = Fault(LayoutMismatch("pages of another size"))
        answer = await suite.generate()
        assert list(answer.token_ids) == model().generate(PROMPT, 8)
        assert answer.policy == "data_parallel"
    assert counter._value.get() == before + 1


async def test_a_prompt_that_is_too_long_to_be_received_is_computed_where_it_is_generated_from() -> None:
    async with running(2, policy="disaggregated") as suite:
        break_all(suite, "PrepRecv", PromptTooLong("of 9 pages, those of one longest prompt stay free of reservations"))
        answer = await suite.generate()
        assert list(answer.token_ids) == model().generate(PROMPT, 8)
        assert answer.policy == "data_parallel"
        break_all(suite, "StartGenerate", PromptTooLong("no engine holds it"))
        with failing("INVALID_ARGUMENT", "PROMPT_TOO_LONG"):
            await suite.generate()


@pytest.mark.parametrize("num_tokens", [2, 3])  # that fit behind the prompt; three are there
async def test_a_stream_never_goes_on_where_the_context_is_too_short(num_tokens: int) -> None:
    peers: dict[str, FakeEngine] = {}
    models = (model(), model(max_context=len(PROMPT) + num_tokens), model())
    engines = [FakeEngine(each, name, peers=peers) for each, name in zip(models, "abc", strict=True)]
    async with running(engines=engines) as suite:
        suite.first.faults["StartGenerate"] = Fault(FakeLoss(LOSS), after_tokens=3)
        answer = await suite.generate()
        assert [leg.engine for leg in answer.legs] == ["a", "c"]
        assert list(answer.token_ids) == model().generate(PROMPT, 8)


async def test_a_deadline_ends_the_trying() -> None:
    async with running(1) as suite:
        suite.first.faults["StartGenerate"] = Fault(FakeError("full", retry_delay_s=60.0), after_tokens=1)
        call = suite.stub.Generate(request(max_tokens=4), timeout=0.3)
        assert (await call.code()).name == "DEADLINE_EXCEEDED"
