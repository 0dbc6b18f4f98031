"""RouterService.Session: what Generate does, for many requests over one stream."""

from __future__ import annotations

import asyncio
import re
import textwrap
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from microserve.router.v1 import router_pb2, router_pb2_grpc
from microserve.types.v1 import sampling_pb2
from tokenizers import Tokenizer

from services.router.cleanup import Cleanup
from services.router.front import conversation, wire
from services.router.metrics import REQUESTS
from services.rpc.status import remote_errors
from services.rpc.timing_messages import duration_message
from tests.fakes import FakeError, FakeModel, Fault
from tests.router.harness import PROMPT, failing, model, policy_metadata, request, running, script
from tests.router.talk import Talk, tokens
from tests.router.vocabularies import byte_level, files

STOP = sampling_pb2.FINISH_REASON_STOP
SLOW_END = """
import asyncio

async def policy(request, fleet):
    async for chunk in fleet.least_loaded(request).start_generate(request):
        yield chunk
    await asyncio.sleep(0.5)
"""
DOCUMENT = Path(__file__).resolve().parents[2] / "docs/clients.md"


async def test_it_answers_as_generate_does() -> None:
    async with running(1, fake_model=script("hello world")) as suite:
        talk = Talk(suite.stub)
        await talk.ask(5, request(text="x", max_tokens=0, stop=["rld"], logprobs=0, request_id="mine"))
        outputs = await talk.answer(5)
        messages = [output.response for output in outputs]
        expected = [m async for m in suite.stream(text="x", max_tokens=0, stop=["rld"], logprobs=0, request_id="mine")]
        assert "".join(m.text for m in messages) == "".join(m.text for m in expected) == "hello wo"
        assert tokens(outputs) == [t for m in expected for t in m.token_ids]
        assert [len(m.logprobs) for m in messages] == [len(m.token_ids) for m in messages]
        first, last = messages[0], messages[-1]
        assert (first.request_id, first.policy) == ("mine", "data_parallel")
        assert (last.finish_reason, last.usage.output_token_count) == (STOP, len(tokens(outputs)))
        assert last.legs[0].timing.computed_token_count > 0
        talk.call.cancel()


async def test_many_at_once_and_the_stream_ends_with_the_last() -> None:
    async with running(2) as suite:
        talk = Talk(suite.stub)
        for call_id in range(40):
            await talk.ask(call_id, request(range(10, 60 + call_id)))
        await talk.call.done_writing()
        for call_id, outputs in enumerate(await talk.answers(*range(40))):
            assert tokens(outputs) == model().generate(tuple(range(10, 60 + call_id)), 8)
        with pytest.raises(EOFError):
            await talk.next()


async def test_a_program_that_ends_by_itself_is_not_closed_by_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    spawned, spawn = [], Cleanup.spawn

    def watched(cleanup: Cleanup, what: str, work: Coroutine[Any, Any, object]) -> asyncio.Task[None]:
        spawned.append(what)
        return spawn(cleanup, what, work)

    monkeypatch.setattr(Cleanup, "spawn", watched)
    async with running(1) as suite:
        talk = Talk(suite.stub)
        await talk.ask(1)
        await talk.call.done_writing()
        assert tokens(await talk.answer(1)) == model().generate(PROMPT, 8)
        with pytest.raises(EOFError):
            await talk.next()
    assert not spawned


async def test_answers_that_wait_for_room_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation, "MAX_WAITING_BYTES", 1)  # there is none while anything waits
    async with running(1) as suite:
        talk = Talk(suite.stub)
        await talk.ask(1, request(max_tokens=50))
        await talk.ask(2, request(max_tokens=50, n=2))
        one, two = await talk.answers(1, 2)
        expected = model().generate(PROMPT, 50)
        assert tokens(one) == tokens(two) == tokens(two, choice=1) == expected
        talk.call.cancel()


async def test_one_that_stands_holds_up_no_other_and_can_be_cancelled() -> None:
    async with running(1) as suite:
        suite.first.faults["StartGenerate"] = hang = Fault(times=1)
        talk = Talk(suite.stub)
        await talk.ask(1)
        await hang.reached.wait()
        await talk.ask(2)
        assert tokens(await talk.answer(2)) == model().generate(PROMPT, 8)
        await talk.cancel(99)
        await talk.cancel(2)
        await talk.cancel(1)
        assert await talk.error(1) == ("CANCELLED", "REQUEST_CANCELLED")
        await suite.idle()
        await talk.ask(3)
        assert tokens(await talk.answer(3)) == model().generate(PROMPT, 8)
        talk.call.cancel()


async def test_the_end_of_the_stream_ends_its_requests() -> None:
    async with running(2) as suite:
        for engine in suite.engines:
            engine.gate.clear()
        talk, other = Talk(suite.stub), Talk(suite.stub)
        for call_id in range(4):
            await talk.ask(call_id)
        await other.ask(0)
        for engine in suite.engines:
            await engine.until(lambda engine=engine: engine.sequences)  # type: ignore[misc]
        talk.call.cancel()
        for engine in suite.engines:
            engine.gate.set()
        assert tokens(await other.answer(0)) == model().generate(PROMPT, 8)
        await suite.idle()
        other.call.cancel()


async def test_the_last_output_is_that_of_all_choices() -> None:
    async with running(1) as suite:
        talk = Talk(suite.stub)
        await talk.ask(1, request(n=3, seed=5, temperature=1.0))
        outputs = await talk.answer(1)
        whole = await suite.stub.Complete(router_pb2.CompleteRequest(request=request(n=3, seed=5, temperature=1.0)))
        expected = [whole.response, *whole.other_choices]
        assert [tokens(outputs, choice) for choice in range(3)] == [list(each.token_ids) for each in expected]
        assert sum(output.response.finish_reason != 0 for output in outputs) == 3
        talk.call.cancel()


async def test_what_is_told_in_several_messages_has_one_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_PROMPT_NUMBERS", 100)
    async with running(1) as suite:
        talk = Talk(suite.stub)
        await talk.ask(1, request(prompt_logprobs=2, echo=True, prompt_only=True))
        outputs = await talk.answer(1)
        assert len(outputs) > 2
        assert sum(len(output.response.prompt_logprobs.logprobs) for output in outputs) == len(PROMPT) - 1
        assert list(outputs[0].response.prompt.token_ids) == list(PROMPT)
        talk.call.cancel()


async def test_errors_are_fields_and_others_go_on() -> None:
    async with running(1) as suite:
        talk = Talk(suite.stub)
        await talk.ask(1, router_pb2.GenerateRequest())
        assert await talk.error(1) == ("INVALID_ARGUMENT", "EMPTY_PROMPT")
        await talk.ask(2, policy="nope")
        assert await talk.error(2) == ("NOT_FOUND", "UNKNOWN_POLICY")
        await talk.ask(3, request(n=1000))
        assert await talk.error(3) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
        await talk.ask(4, request(request_id="x" * 1000))
        assert await talk.error(4) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
        suite.first.faults["StartGenerate"] = Fault(FakeError("there is no room"), times=9)
        await talk.ask(5)
        assert await talk.error(5) == ("RESOURCE_EXHAUSTED", "NO_PAGES")
        suite.first.faults.clear()
        await talk.ask(6)
        assert tokens(await talk.answer(6)) == model().generate(PROMPT, 8)
        talk.call.cancel()


async def test_too_many_requests_are_refused_at_once() -> None:
    async with running(1, max_requests=1) as suite:
        suite.first.gate.clear()
        talk = Talk(suite.stub)
        await talk.ask(1)
        await suite.first.until(lambda: suite.first.sequences)
        await talk.ask(2)
        refused = await talk.next()
        assert (refused.call_id, refused.error.reason, refused.last) == (2, "OVERLOADED", True)
        assert refused.error.retry_delay.seconds == 1
        suite.first.gate.set()
        assert tokens(await talk.answer(1)) == model().generate(PROMPT, 8)
        talk.call.cancel()


@pytest.mark.parametrize("of_the_stream", [False, pytest.param(True, marks=pytest.mark.slow)])
async def test_its_time_ends_a_request(of_the_stream: bool) -> None:
    """The request's own with a typed error, the stream's with the stream."""
    async with running(1) as suite:
        suite.first.gate.clear()
        talk = Talk(suite.stub, timeout_s=3.0 if of_the_stream else None)
        if of_the_stream:
            # Whichever of the two clocks is first, and however late the request is.
            with failing("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED"), remote_errors():
                await talk.ask(1, timeout=duration_message(60))
                await talk.next()
                await talk.next()
        else:
            await talk.ask(1, timeout=duration_message(0.05))
            assert await talk.error(1) == ("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED")
        await suite.idle()
        talk.call.cancel()


async def test_terms_of_the_stream_count_where_a_request_has_none() -> None:
    async with running(2) as suite:
        talk = Talk(suite.stub, policy_metadata("disaggregated"))
        await talk.ask(1)
        await talk.ask(2, policy="data_parallel")
        one, other = await talk.answers(1, 2)
        assert (one[0].response.policy, other[0].response.policy) == ("disaggregated", "data_parallel")
        talk.call.cancel()
        talk = Talk(suite.stub, (("x-microserve-priority", "urgent"), ("x-microserve-tenant", "t" * 129)))
        await talk.ask(1, tenant="me")
        await talk.ask(2, priority="low")
        await talk.ask(3, priority="low", tenant="me")
        one, two, three = await talk.answers(1, 2, 3)
        assert "priority 'urgent'" in one[0].error.message
        assert "tenant" in two[0].error.message
        assert tokens(three) == model().generate(PROMPT, 8)
        talk.call.cancel()


NOTHING = router_pb2.SessionRequest()
AGAIN = router_pb2.SessionRequest(generate=router_pb2.GenerateCall(call_id=7, request=request()))


@pytest.mark.parametrize("wrong", [NOTHING, AGAIN], ids=["nothing", "again"])
async def test_who_breaks_the_rules_is_told_when_what_runs_has_ended(
    wrong: router_pb2.SessionRequest,
) -> None:
    async with running(1) as suite:
        suite.first.gate.clear()
        talk = Talk(suite.stub)
        await talk.ask(7)
        await talk.call.write(wrong)
        await suite.first.until(lambda: suite.first.sequences)
        suite.first.gate.set()
        assert tokens(await talk.answer(7)) == model().generate(PROMPT, 8)
        with failing("INVALID_ARGUMENT", "INVALID_REQUEST"):
            await talk.next()


async def test_an_answer_that_fits_into_no_message_fails_alone() -> None:
    wordy = Tokenizer.from_str(byte_level().to_str())
    wordy.add_tokens(["x" * 2000])
    long = wordy.token_to_id("x" * 2000)
    fake = FakeModel(files(wordy), script=(long,) * 8)
    async with running(1, max_message_bytes=2 << 20, fake_model=fake) as suite:
        assert (await suite.stub.ListModels(router_pb2.ListModelsRequest())).max_message_bytes == 2 << 20
        suite.first.gate.clear()
        talk = Talk(suite.stub)
        await talk.ask(1)
        # As ids it is small, as text it is not.
        await talk.ask(2, request((long,) * 1_100, echo=True))
        await suite.first.until(lambda: len(suite.first.sequences) == 2)
        suite.first.gate.set()
        whole, too_large = await talk.answers(1, 2)
        assert tokens(whole) == [long] * 8
        assert (too_large[-1].error.reason, len(too_large)) == ("INVALID_REQUEST", 1)
        await suite.idle()
        talk.call.cancel()


async def test_bytes_that_are_no_command_end_the_stream_as_the_clients_fault() -> None:
    async with running(1) as suite:
        raw = suite.channels[0].stream_stream("/microserve.router.v1.RouterService/Session")
        call = raw()
        await call.write(b"\xff\xff\xff")
        with failing("INVALID_ARGUMENT", "INVALID_REQUEST"), remote_errors():
            await call.read()


async def test_an_answer_is_whole_when_its_client_has_it(tmp_path: Path) -> None:
    """Whatever its program does after that, and though it is cancelled then."""
    program = tmp_path / "slow_end.py"
    program.write_text(SLOW_END)
    async with running(1, policy="slow_end", policy_file=(program,)) as suite:
        before = REQUESTS.labels("fake", "slow_end", "OK")._value.get()
        talk = Talk(suite.stub)
        await talk.ask(1)
        await talk.answer(1)
        await talk.cancel(1)
        await talk.call.done_writing()
        with pytest.raises(EOFError):
            await talk.next()
        assert REQUESTS.labels("fake", "slow_end", "OK")._value.get() == before + 1


@pytest.mark.slow
async def test_a_client_that_never_reads_is_cut_off() -> None:
    """All its requests end, and the others' go on."""
    wordy = Tokenizer.from_str(byte_level().to_str())
    wordy.add_tokens(["x" * 2000])  # so that the connection is soon full
    endless = FakeModel(files(wordy), script=(wordy.token_to_id("x" * 2000),) * 90_000, max_context=100_000)
    async with running(1, fake_model=endless, client_timeout=0.1) as suite:
        talk = Talk(suite.stub)
        for call_id in range(3):
            await talk.ask(call_id, request(max_tokens=0))
        await suite.first.until(lambda: suite.first.sequences)
        await suite.idle()
        with failing("RESOURCE_EXHAUSTED", "SLOW_CONSUMER"):
            await talk.answers(1, 2, 0)
        assert list((await suite.generate(max_tokens=1)).token_ids)


async def test_the_example_of_the_documents() -> None:
    (source,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    names = {**vars(router_pb2), "RouterServiceStub": router_pb2_grpc.RouterServiceStub}
    exec(compile(textwrap.dedent(source), "docs/clients.md", "exec"), names)
    async with running(1, fake_model=script("hello")) as suite:
        assert await names["ask"](suite.stub, ["a", "", "b"]) == ["hello", "the prompt has no text", "hello"]
