"""StartGenerate, Session and Complete mean the same: one suite over all three."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest
from microserve.engine.v1 import engine_pb2 as pb
from microserve.types.v1 import sampling_pb2

from services.engine.core.api import Cancel, RequestKey, ReservationRef, StartGenerate, TokenLogprobs
from services.engine.errors import DeadlineExceeded, QueueFull
from services.engine.sampling.params import SamplingParams
from services.engine.sampling.prompt_logprobs import PromptLogprobs
from services.protocol.timing import Timing
from tests.engine.front.harness import OWNER, Served, output, serve, start_request
from tests.engine.front.readers import CompleteReader, SessionReader, StartGenerateReader

READERS = [StartGenerateReader, SessionReader, CompleteReader]
INVALID_ARGUMENT, DEADLINE_EXCEEDED, ALREADY_EXISTS, RESOURCE_EXHAUSTED, UNAVAILABLE = 3, 4, 6, 8, 14

Reader = type[StartGenerateReader] | type[SessionReader]
pytestmark = pytest.mark.parametrize("reader", READERS, ids=lambda r: r.__name__.removesuffix("Reader"))


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serve() as served:
        yield served


async def test_tokens_logprobs_finish_and_timing(served: Served, reader: Reader) -> None:
    reading = reader(served.stub, start_request())
    command = await served.engine.next(StartGenerate)
    first = TokenLogprobs((10, -0.5), ((10, -0.5), (11, -1.5)))
    served.engine.step(output(command, 10, logprobs=(first,)))
    served.engine.step(output(command, 12, finish_reason="STOP", timing=Timing(matched_tokens=2, total_s=1.5)))
    outcome = await reading.result()
    assert outcome.token_ids == [10, 12]
    assert [(p.token_id, p.logprob) for p in outcome.logprobs[0].top] == [(10, -0.5), (11, -1.5)]
    assert outcome.finish_reason == sampling_pb2.FINISH_REASON_STOP
    assert outcome.timing is not None
    assert (outcome.timing.matched_token_count, outcome.timing.total.ToMilliseconds()) == (2, 1500)


async def test_the_command_says_what_the_request_said(served: Served, reader: Reader) -> None:
    request = start_request(
        prompt=(1, 2, 3, 4),
        begin=2,
        prompt_token_count=3,
        cache_salt="salt",
        reservation=pb.ReservationRef(reservation_id="res", secret=b"s" * 16),
        sampling=sampling_pb2.SamplingParams(temperature=0.7, seed=9, logprobs=0, max_tokens=5, logit_bias={3: 1.5}),
        forced_token_ids=(8, 9),
    )
    request.timeout.FromSeconds(20)
    reader(served.stub, request)
    command = await served.engine.next(StartGenerate)
    assert command == StartGenerate(
        key=RequestKey(OWNER, "r1"),
        prompt=(1, 2, 3, 4),
        begin=2,
        prompt_token_count=3,
        sampling=SamplingParams(temperature=0.7, seed=9, logprobs=0, max_tokens=5, logit_bias=((3, 1.5),)),
        reservation=ReservationRef("res", b"s" * 16),
        cache_salt="salt",
        deadline=1020.0,
        forced=(8, 9),
        call_id=command.call_id,
    )


async def test_the_sooner_of_timeout_and_call_deadline_counts(served: Served, reader: Reader) -> None:
    request = start_request()
    request.timeout.FromSeconds(2000)
    reader(served.stub, request, timeout=50)
    command = await served.engine.next(StartGenerate)
    assert command.deadline is not None
    # The wire rounds a timeout up by a fraction of a percent.
    assert 1040 < command.deadline < 1051


async def test_a_refusal_keeps_its_code_reason_and_delay(served: Served, reader: Reader) -> None:
    reading = reader(served.stub, start_request())
    command = await served.engine.next(StartGenerate)
    served.engine.step(output(command, error=QueueFull("The queue is full.", retry_delay_s=0.25)))
    outcome = await reading.result()
    assert outcome.error == (RESOURCE_EXHAUSTED, "QUEUE_FULL", 0.25)
    assert outcome.message == "The queue is full."


async def test_a_sequence_that_fails_midway_keeps_its_tokens_and_says_why(served: Served, reader: Reader) -> None:
    reading = reader(served.stub, start_request())
    command = await served.engine.next(StartGenerate)
    served.engine.step(output(command, 10, 11))
    served.engine.step(output(command, 12, error=DeadlineExceeded("The time is up.")))
    outcome = await reading.result()
    assert outcome.error == (DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", None)
    # A unary call has either a reply or an error.
    assert outcome.token_ids == ([10, 11, 12] if reader.streams else [])


async def test_a_prompt_is_told_of_before_the_first_token(served: Served, reader: Reader) -> None:
    params = sampling_pb2.SamplingParams(prompt_logprobs=2)
    reading = reader(served.stub, start_request(prompt=(5, 6, 7, 8), prompt_logprobs_begin=1, sampling=params))
    command = await served.engine.next(StartGenerate)
    assert (command.sampling.prompt_logprobs, command.prompt_logprobs_begin) == (2, 1)
    served.engine.step(output(command, prompt_logprobs=rated([-0.5, -1.5], first_id=10)))
    served.engine.step(output(command, 20, prompt_logprobs=rated([-2.5], first_id=30)))
    served.engine.step(output(command, 21, finish_reason="LENGTH"))
    outcome = await reading.result()
    assert outcome.token_ids == [20, 21]
    assert list(outcome.prompt_logprobs.logprobs) == [-0.5, -1.5, -2.5]
    assert outcome.prompt_logprobs.top_count == 2
    assert list(outcome.prompt_logprobs.top_token_ids) == [10, 11, 12, 13, 30, 31]
    assert list(outcome.prompt_logprobs.top_logprobs) == [-0.5, -1.5, -1.5, -2.5, -2.5, -3.5]


def rated(logprobs: list[float], first_id: int) -> PromptLogprobs:
    """Of some tokens, each with two alternatives."""
    own = np.array(logprobs, dtype=np.float32)
    ids = np.arange(first_id, first_id + 2 * len(logprobs), dtype=np.int32).reshape(-1, 2)
    return PromptLogprobs(own, ids, np.stack([own, own - 1], axis=1))


BAD_STARTS = {
    "EMPTY_PROMPT": {"prompt": ()},
    "TOKEN_OUT_OF_RANGE": {"prompt": (5, 100)},
    "PROMPT_TOO_LONG": {"prompt": (1,) * 64},
    "PROMPT_TOO_LONG with forced tokens": {"prompt": (1,) * 60, "forced_token_ids": (1,) * 5},
    "TOKEN_OUT_OF_RANGE in forced tokens": {"forced_token_ids": (100,)},
    "INVALID_RANGE of begin": {"begin": 4},
    "INVALID_RANGE of begin without a reservation": {"begin": 1},
    "INVALID_RANGE of prompt_token_count": {"prompt_token_count": 4},
    "INVALID_RANGE of prompt_logprobs_begin": {"prompt_logprobs_begin": 4},
    "INVALID_RANGE of prompt_logprobs_begin in a continuation": {"prompt_logprobs_begin": 3, "prompt_token_count": 2},
    "BAD_REQUEST for no owner": {"owner_id": ""},
    "BAD_REQUEST for a long owner": {"owner_id": "o" * 129},
    "BAD_REQUEST for a long salt": {"cache_salt": "s" * 129},
    "BAD_REQUEST for a short secret": {"reservation": pb.ReservationRef(reservation_id="res", secret=b"short")},
    "INVALID_SAMPLING of temperature": {"sampling": sampling_pb2.SamplingParams(temperature=-1)},
    "INVALID_SAMPLING of nan": {"sampling": sampling_pb2.SamplingParams(top_p=float("nan"))},
    "INVALID_SAMPLING of infinity": {"sampling": sampling_pb2.SamplingParams(temperature=float("inf"))},
    "INVALID_SAMPLING of logprobs": {"sampling": sampling_pb2.SamplingParams(logprobs=21)},
    "INVALID_SAMPLING of prompt_logprobs": {"sampling": sampling_pb2.SamplingParams(prompt_logprobs=21)},
    "INVALID_SAMPLING of a stop token": {"sampling": sampling_pb2.SamplingParams(stop_token_ids=[100])},
    "INVALID_SAMPLING of nothing left to generate": {
        "prompt_token_count": 1,
        "sampling": sampling_pb2.SamplingParams(max_tokens=2),
    },
}


@pytest.mark.parametrize("case", BAD_STARTS)
async def test_bad_input_is_refused_in_a_sentence(served: Served, reader: Reader, case: str) -> None:
    outcome = await reader(served.stub, start_request(**BAD_STARTS[case])).result()
    assert outcome.error == (INVALID_ARGUMENT, case.split()[0], None)
    assert outcome.message.endswith(".")
    assert served.engine.untaken(StartGenerate) == 0, "nothing has begun"


async def test_a_negative_timeout_is_refused(served: Served, reader: Reader) -> None:
    request = start_request()
    request.timeout.FromSeconds(-1)
    assert (await reader(served.stub, request).result()).error == (INVALID_ARGUMENT, "BAD_REQUEST", None)


async def test_the_id_of_a_live_sequence_is_taken(served: Served, reader: Reader) -> None:
    living = reader(served.stub, start_request())
    command = await served.engine.next(StartGenerate)
    again = await reader(served.stub, start_request()).result()
    assert again.error == (ALREADY_EXISTS, "SEQUENCE_EXISTS", None)
    other = await reader(served.stub, start_request(prompt=(9,))).result()
    assert other.error == (INVALID_ARGUMENT, "REQUEST_ID_REUSED", None)
    assert served.engine.untaken(Cancel) == 0, "a refused start ends nothing"
    served.engine.step(output(command, 10, finish_reason="LENGTH"))
    assert (await living.result()).token_ids == [10]


async def test_a_client_that_cancels_leaves_nothing(served: Served, reader: Reader) -> None:
    reading = reader(served.stub, start_request())
    command = await served.engine.next(StartGenerate)
    if reader.streams:
        served.engine.step(output(command, 10))
        await reading.read()
    await reading.cancel()
    assert await served.engine.next(Cancel) == Cancel(command.key)


async def test_a_call_whose_deadline_passes_leaves_nothing(served: Served, reader: Reader) -> None:
    for timeout_s in (0.2, 2.0, 20.0):  # until one is long enough for the call to arrive
        reading = reader(served.stub, start_request(f"r{timeout_s}"), timeout=timeout_s)
        arriving = asyncio.ensure_future(served.engine.next(StartGenerate))
        if (await asyncio.wait({arriving}, timeout=timeout_s))[0]:
            break
        arriving.cancel()
    command = await arriving
    assert await served.engine.next(Cancel) == Cancel(command.key)
    if reader is not SessionReader:
        assert (await reading.result()).error == (DEADLINE_EXCEEDED, "", None)


async def test_a_name_is_free_again_as_soon_as_its_caller_left(served: Served, reader: Reader) -> None:
    reading = StartGenerateReader(served.stub, start_request())
    old = await served.engine.next(StartGenerate)
    await reading.cancel()
    await served.engine.next(Cancel)
    again = reader(served.stub, start_request())
    new = await served.engine.next(StartGenerate)
    served.engine.step(output(old, 1, 2, finish_reason="CANCELLED"), output(new, 3, finish_reason="STOP"))
    assert (await again.result()).token_ids == [3], "the last words of the old sequence reach nobody"


async def test_a_failed_engine_answers_everybody(served: Served, reader: Reader) -> None:
    reading = reader(served.stub, start_request())
    await served.engine.next(StartGenerate)
    served.engine.front.on_fatal(RuntimeError("broken"))
    assert (await reading.result()).error == (UNAVAILABLE, "ENGINE_STOPPED", None)
    late = await reader(served.stub, start_request("r2")).result()
    assert late.error == (UNAVAILABLE, "ENGINE_STOPPED", None)
    await served.engine.stopped.wait()
