"""StartGenerate, Session and Complete of a real engine give the same, token by token and error by error."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import grpc.aio
import pytest
from microserve.engine.v1 import engine_pb2 as pb
from microserve.types.v1 import sampling_pb2

from tests.contract.verbs import MAX_CONTEXT, VOCAB, prompt_of
from tests.e2e.suite import OWNER, Engine, Suite, generate, idle, wait_for_load
from tests.engine.front.readers import CompleteReader, Outcome, SessionReader, StartGenerateReader
from tests.faults.gates import StepGate

pytestmark = pytest.mark.slow

STOP, LENGTH = sampling_pb2.FINISH_REASON_STOP, sampling_pb2.FINISH_REASON_LENGTH
CANCELLED = sampling_pb2.FINISH_REASON_CANCELLED


@pytest.fixture(scope="module")
def steps(gates: tuple[StepGate, StepGate]) -> StepGate:
    """Of the first engine."""
    return gates[0]


def start(
    suite: Suite, prompt: Sequence[int], sampling: dict[str, object], **fields: object
) -> pb.StartGenerateRequest:
    params = {"max_tokens": 12, "logprobs": 3, "ignore_eos": True, **sampling}
    # A salt, because prompts of other modules begin alike.
    values = {"owner_id": OWNER, "request_id": suite.new_id(), "cache_salt": "streams", **fields}
    return pb.StartGenerateRequest(prompt_token_ids=prompt, sampling=sampling_pb2.SamplingParams(**params), **values)


def renamed(suite: Suite, request: pb.StartGenerateRequest) -> pb.StartGenerateRequest:
    copy = pb.StartGenerateRequest()
    copy.CopyFrom(request)
    copy.request_id = suite.new_id()
    return copy


async def converse(at: Engine, requests: Sequence[pb.StartGenerateRequest]) -> list[Outcome]:
    """All of them at once on one Session, half-closed as soon as all have been sent."""
    outcomes = {request.request_id: Outcome() for request in requests}
    call = at.stub.Session(timeout=120)
    for request in requests:
        await call.write(pb.SessionRequest(start=request))
    await call.done_writing()
    async for frame in call:
        add(outcomes, frame)
    return [outcomes[request.request_id] for request in requests]


def add(outcomes: dict[str, Outcome], frame: pb.SessionResponse) -> None:
    names = [entry.request_id for entry in frame.outputs]
    assert len(set(names)) == len(names), "at most one entry a sequence"
    for entry in frame.outputs:
        outcome = outcomes[entry.request_id]
        assert not outcome.finish_reason, "nothing follows the end of a sequence"
        assert outcome.error is None, "nothing follows the end of a sequence"
        if entry.HasField("output"):
            outcome.add(entry.output)
        if entry.HasField("error"):
            outcome.fail(entry.error)


async def every_way(suite: Suite, at: Engine, request: pb.StartGenerateRequest) -> Outcome:
    """What all ways of asking agree on; one of them in company."""
    outcomes = [
        await reader(at.stub, renamed(suite, request), 120).result()
        for reader in (StartGenerateReader, SessionReader, CompleteReader)
    ]
    company = [start(suite, prompt_of(20 + i, seed=50 + i), {"temperature": 1.0, "seed": i}) for i in range(5)]
    outcomes.append((await converse(at, [*company, renamed(suite, request)]))[-1])
    for other in outcomes[1:]:
        assert_same(outcomes[0], other)
    return outcomes[0]


def assert_same(one: Outcome, other: Outcome) -> None:
    assert other.token_ids == one.token_ids
    assert (other.finish_reason, other.error) == (one.finish_reason, one.error)
    assert [chosen.chosen.token_id for chosen in other.logprobs] == [chosen.chosen.token_id for chosen in one.logprobs]
    assert flat(other) == pytest.approx(flat(one), abs=1e-4)
    assert list(other.prompt_logprobs.logprobs) == pytest.approx(list(one.prompt_logprobs.logprobs), abs=1e-4)


def flat(outcome: Outcome) -> list[float]:
    return [t.logprob for logprobs in outcome.logprobs for t in (logprobs.chosen, *logprobs.top)]


SAMPLINGS: dict[str, dict[str, object]] = {
    "greedy": {},
    "sampled": {"temperature": 0.8, "seed": 3},
    "truncated": {"temperature": 1.2, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "seed": 4},
    "penalised": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    "one token": {"max_tokens": 1},
}


@pytest.mark.parametrize("case", SAMPLINGS)
async def test_all_ways_give_the_same(suite: Suite, case: str) -> None:
    request = start(suite, prompt_of(37), SAMPLINGS[case])
    outcome = await every_way(suite, suite.engines[0], request)
    assert outcome.error is None
    assert len(outcome.token_ids) == len(outcome.logprobs) == request.sampling.max_tokens
    assert all(len(logprobs.top) == 3 for logprobs in outcome.logprobs)
    assert outcome.finish_reason == LENGTH
    assert outcome.timing is not None
    assert outcome.timing.generated_token_count == request.sampling.max_tokens
    assert_same(outcome, await StartGenerateReader(suite.engines[1].stub, renamed(suite, request)).result())


async def test_a_prompt_is_rated_the_same_every_way_and_wherever_its_kv_is(suite: Suite) -> None:
    """Also as forced tokens after its first one, which engines rated before they rated prompts."""
    prompt, at = prompt_of(700), suite.engines[0]
    forced = await generate(suite, at, prompt[:1], forced=prompt[1:], salt="forced")
    expected = [each.chosen.logprob for each in forced.logprobs]
    for _ in range(2):  # the second time all of it is cached
        request = start(suite, prompt, {"prompt_logprobs": 3, "max_tokens": 4})
        outcome = await every_way(suite, at, request)
        told = outcome.prompt_logprobs
        assert list(told.logprobs) == pytest.approx(expected, abs=1e-4)
        assert (told.top_count, len(told.top_token_ids), len(told.top_logprobs)) == (3, 3 * 699, 3 * 699)
        best = [each.top[0].logprob for each in forced.logprobs]
        assert list(told.top_logprobs)[::3] == pytest.approx(best, abs=1e-4)
        assert len(outcome.token_ids) == 4
    rest = await StartGenerateReader(
        at.stub, start(suite, prompt, {"prompt_logprobs": 0}, prompt_logprobs_begin=650)
    ).result()
    assert list(rest.prompt_logprobs.logprobs) == pytest.approx(expected[649:], abs=1e-4)
    assert rest.timing is not None
    assert rest.timing.matched_token_count == 649


async def test_many_sequences_on_one_session(suite: Suite) -> None:
    at = suite.engines[0]
    requests = [
        start(suite, prompt_of(5 + 13 * i, seed=i), {"temperature": 0.9 * (i % 2), "seed": i, "max_tokens": 5 + i})
        for i in range(12)
    ]
    requests.insert(6, start(suite, [], {}))
    together = await converse(at, requests)
    for request, outcome in zip(requests, together, strict=True):
        assert_same(await StartGenerateReader(at.stub, renamed(suite, request)).result(), outcome)
    assert together[6].error is not None, "a bad start leaves the others alone"
    await wait_for_load(at, idle)


NOBODY = pb.ReservationRef(reservation_id="nobody", secret=bytes(16))
BAD_STARTS: dict[str, tuple[int, dict[str, object]]] = {
    "EMPTY_PROMPT": (3, {"prompt_token_ids": []}),
    "TOKEN_OUT_OF_RANGE": (3, {"prompt_token_ids": [5, VOCAB]}),
    "TOKEN_OUT_OF_RANGE forced": (3, {"forced_token_ids": [VOCAB]}),
    "PROMPT_TOO_LONG": (3, {"prompt_token_ids": [5] * MAX_CONTEXT}),
    "INVALID_RANGE begin without a reservation": (3, {"begin": 1}),
    "INVALID_RANGE prompt_token_count": (3, {"prompt_token_count": 4}),
    "INVALID_SAMPLING temperature": (3, {"sampling": sampling_pb2.SamplingParams(temperature=-1)}),
    "INVALID_SAMPLING logprobs": (3, {"sampling": sampling_pb2.SamplingParams(logprobs=21)}),
    "INVALID_SAMPLING stop token": (3, {"sampling": sampling_pb2.SamplingParams(stop_token_ids=[VOCAB])}),
    "INVALID_SAMPLING bias token": (3, {"sampling": sampling_pb2.SamplingParams(logit_bias={VOCAB: 1.0})}),
    "BAD_REQUEST owner": (3, {"owner_id": ""}),
    "BAD_REQUEST salt": (3, {"cache_salt": "s" * 129}),
    "UNKNOWN_RESERVATION": (5, {"reservation": NOBODY}),
}


@pytest.mark.parametrize("case", BAD_STARTS)
async def test_bad_starts_fail_alike(suite: Suite, case: str) -> None:
    code, fields = BAD_STARTS[case]
    for reader in (StartGenerateReader, SessionReader, CompleteReader):
        values = {"owner_id": OWNER, "request_id": suite.new_id(), "prompt_token_ids": [5, 6, 7], **fields}
        outcome = await reader(suite.engines[0].stub, pb.StartGenerateRequest(**values), 60).result()
        assert outcome.error == (code, case.split()[0], None)
        assert len(outcome.message) > 10
        assert outcome.token_ids == []


async def test_a_seed_decides_whatever_the_batch(suite: Suite) -> None:
    at, prompt = suite.engines[0], prompt_of(60, seed=1)
    request = start(suite, prompt, {"temperature": 0.8, "seed": 7, "max_tokens": 30})
    alone = await StartGenerateReader(at.stub, renamed(suite, request)).result()
    for size in (2, 9):
        others = [start(suite, prompt, {"temperature": 0.8, "seed": 100 + i}) for i in range(size)]
        *company, same = await converse(at, [*others, renamed(suite, request)])
        assert_same(alone, same)
        assert len({tuple(other.token_ids) for other in company}) > 1, "seeds matter"


async def test_a_sequence_goes_on_elsewhere(suite: Suite) -> None:
    here, there = suite.engines[:2]
    prompt, params = prompt_of(41, seed=2), {"temperature": 0.8, "seed": 7, "max_tokens": 20, "frequency_penalty": 0.5}
    whole = await every_way(suite, here, start(suite, prompt, params))
    assert len(whole.token_ids) == 20
    given = [*prompt, *whole.token_ids[:8]]
    rest = await every_way(suite, there, start(suite, given, params, prompt_token_count=len(prompt)))
    assert rest.token_ids == whole.token_ids[8:]
    assert rest.finish_reason == whole.finish_reason == LENGTH
    count = 4 * 8  # the chosen one and three alternatives of each
    assert flat(rest) == pytest.approx(flat(whole)[count:], abs=1e-4)


async def test_stop_tokens_end_and_are_part_of_the_output(suite: Suite) -> None:
    at, prompt = suite.engines[0], prompt_of(30, seed=3)
    free = await every_way(suite, at, start(suite, prompt, {}))
    stop = free.token_ids[7]
    first = free.token_ids.index(stop)
    outcome = await every_way(suite, at, start(suite, prompt, {"stop_token_ids": [stop]}))
    assert outcome.token_ids == free.token_ids[: first + 1]
    assert outcome.finish_reason == STOP


async def test_the_end_token_ends_unless_ignored(suite: Suite) -> None:
    at, prompt = suite.engines[0], prompt_of(30, seed=3)
    (end,) = (await at.stub.GetInfo(pb.GetInfoRequest())).eos_token_ids
    biased = {"logit_bias": {end: 100.0}, "max_tokens": 4}
    ended = await every_way(suite, at, start(suite, prompt, {**biased, "ignore_eos": False}))
    assert (ended.token_ids, ended.finish_reason) == ([end], STOP)
    ignored = await every_way(suite, at, start(suite, prompt, biased))
    assert (ignored.token_ids, ignored.finish_reason) == ([end] * 4, LENGTH)


async def test_min_tokens_holds_the_end_back(suite: Suite) -> None:
    at, prompt = suite.engines[0], prompt_of(30, seed=3)
    (end,) = (await at.stub.GetInfo(pb.GetInfoRequest())).eos_token_ids
    wish = {"logit_bias": {end: 100.0}, "min_tokens": 5, "ignore_eos": False}
    outcome = await every_way(suite, at, start(suite, prompt, wish))
    assert outcome.finish_reason == STOP
    assert outcome.token_ids.index(end) == 5, "the first token that may end it does"
    assert len(outcome.token_ids) == 6
    # Tokens generated elsewhere count.
    given = [*prompt, *outcome.token_ids[:3]]
    rest = await every_way(suite, at, start(suite, given, wish, prompt_token_count=len(prompt)))
    assert rest.token_ids == outcome.token_ids[3:]


async def test_max_tokens_zero_fills_the_context(suite: Suite) -> None:
    prompt = prompt_of(MAX_CONTEXT - 6, seed=4)
    outcome = await every_way(suite, suite.engines[0], start(suite, prompt, {"max_tokens": 0}))
    assert (len(outcome.token_ids), outcome.finish_reason) == (6, LENGTH)


async def test_forced_tokens_are_produced_with_the_models_own_logprobs(suite: Suite) -> None:
    at, prompt, forced = suite.engines[0], prompt_of(30, seed=5), prompt_of(9, seed=6)
    request = start(suite, prompt, {"stop_token_ids": [forced[2]], "max_tokens": 0}, forced_token_ids=forced)
    outcome = await every_way(suite, at, request)
    assert (outcome.token_ids, outcome.finish_reason) == (forced, LENGTH)
    # The first is scored as the model sees it after the prompt.
    free = await every_way(suite, at, start(suite, prompt, {"max_tokens": 1}))
    assert flat(outcome)[1:4] == pytest.approx(flat(free)[1:4], abs=1e-4)
    assert outcome.logprobs[0].chosen.logprob < free.logprobs[0].chosen.logprob


async def test_cancel_sequence_ends_one_of_a_session(suite: Suite, steps: StepGate) -> None:
    at = suite.engines[0]
    doomed = start(suite, prompt_of(20, seed=8), {"max_tokens": 3500})
    spared = start(suite, prompt_of(20, seed=9), {"max_tokens": 60})
    outcomes = {doomed.request_id: Outcome(), spared.request_id: Outcome()}
    call = at.stub.Session(timeout=120)
    with steps.closed() as gate:
        for request in (doomed, spared):
            await call.write(pb.SessionRequest(start=request))
        while not outcomes[doomed.request_id].token_ids:
            add(outcomes, await gate.until(call.read()))
        await call.write(pb.SessionRequest(cancel=pb.CancelCall(request_id="nobody")))
        await call.write(pb.SessionRequest(cancel=pb.CancelCall(request_id=doomed.request_id)))
        await call.done_writing()
    while isinstance(frame := await call.read(), pb.SessionResponse):
        add(outcomes, frame)
    cancelled = outcomes[doomed.request_id]
    assert cancelled.finish_reason == CANCELLED
    assert 0 < len(cancelled.token_ids) < 3500
    assert cancelled.timing is not None
    assert_same(await StartGenerateReader(at.stub, renamed(suite, spared)).result(), outcomes[spared.request_id])
    await wait_for_load(at, idle)


async def test_the_end_of_a_session_cancels_its_sequences(suite: Suite, steps: StepGate) -> None:
    at = suite.engines[0]
    call = at.stub.Session()
    with steps.closed() as gate:
        for i in range(4):
            await call.write(pb.SessionRequest(start=start(suite, prompt_of(20, seed=i), {"max_tokens": 3500})))
        begun = await gate.until(wait_for_load(at, lambda report: report.running_sequence_count == 4))
        before = await gate.until(call.read())
        assert before.outputs
        call.cancel()
    report = await wait_for_load(at, idle)
    assert report.step_count - begun.step_count < 3000, "they did not just run to their end"


async def test_a_session_that_nobody_reads_stalls_nobody(suite: Suite) -> None:
    at = suite.engines[1]
    other = start(suite, prompt_of(33, seed=10), {"max_tokens": 20})
    expected = await StartGenerateReader(at.stub, renamed(suite, other)).result()
    unread = [start(suite, prompt_of(12, seed=i), {"max_tokens": 1500}) for i in range(16)]
    call = at.stub.Session(timeout=200)
    for request in unread:
        await call.write(pb.SessionRequest(start=request))
    await wait_for_load(at, lambda report: report.running_sequence_count == len(unread))
    assert_same(expected, await StartGenerateReader(at.stub, renamed(suite, other), 60).result())
    await wait_for_load(at, idle, 150)  # the sequences end without a reader
    await read_all(call, unread)


async def test_an_unread_session_loses_nothing_however_much_is_unread(suite: Suite) -> None:
    at = suite.engines[1]
    # 8 MiB with their log-probabilities, where a message holds 4.
    unread = [start(suite, prompt_of(12, seed=i), {"max_tokens": 2500, "logprobs": 20}) for i in range(16)]
    call = at.stub.Session(timeout=200)
    for request in unread:
        await call.write(pb.SessionRequest(start=request))
    await wait_for_load(at, lambda report: report.running_sequence_count == len(unread))
    await wait_for_load(at, idle, 150)
    await read_all(call, unread)


async def read_all(call: grpc.aio.StreamStreamCall, requests: Sequence[pb.StartGenerateRequest]) -> None:
    """Reads a session to its end, where every sequence has all its tokens."""
    outcomes = {request.request_id: Outcome() for request in requests}
    await call.done_writing()
    async for frame in call:
        add(outcomes, frame)
    for request in requests:
        outcome = outcomes[request.request_id]
        assert len(outcome.token_ids) == len(outcome.logprobs) == request.sampling.max_tokens
        assert outcome.finish_reason == LENGTH


async def test_callers_of_all_kinds_at_once(suite: Suite) -> None:
    at, prompt = suite.engines[0], prompt_of(50, seed=11)
    request = start(suite, prompt, {"temperature": 0.7, "seed": 5, "max_tokens": 40})
    readers = [StartGenerateReader, SessionReader, CompleteReader] * 3
    outcomes = await asyncio.gather(*(kind(at.stub, renamed(suite, request), 60).result() for kind in readers))
    for outcome in outcomes:
        assert_same(outcomes[0], outcome)
    direct = await generate(suite, at, prompt, max_tokens=40, temperature=0.7, seed=5)
    assert direct.token_ids == outcomes[0].token_ids
    await wait_for_load(at, idle)
