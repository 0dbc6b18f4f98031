"""Sequences that a program reads, hands on whole, or both."""

from __future__ import annotations

import asyncio
from pathlib import Path
from textwrap import dedent, indent

import pytest

from services.router.values import FinishReason
from tests.fakes import FakeError, Fault
from tests.router.harness import PROMPT, Running, failing, first_tokens, model, running


def program(folder: Path, body: str) -> str:
    """A policy of this body; `said` is a list of its module."""
    path = folder / "program.py"
    header = "import asyncio\n\nsaid = []\n\nasync def policy(request, fleet):\n"
    path.write_text(header + indent(dedent(body), "    "))
    return str(path)


def said(suite: Running) -> list[object]:
    found: list[object] = suite.router.catalogue.get("program").function.__globals__["said"]
    return found


@pytest.mark.parametrize(
    "body",
    [
        "yield fleet.engines[0].start_generate(request)",
        "async for chunk in fleet.engines[0].start_generate(request):\n    yield chunk",
        "generation = fleet.engines[0].start_generate(request)\nyield await anext(generation)\nyield generation",
        "generation = fleet.engines[0].start_generate(request)\nyield generation\nyield generation",
    ],
    ids=["handed on", "read", "read and handed on", "handed on twice"],
)
async def test_the_answer_is_the_same_however_it_comes(tmp_path: Path, body: str) -> None:
    async with running(policy=program(tmp_path, body)) as suite:
        answer = await suite.generate()
        assert list(answer.token_ids) == model().generate(PROMPT, 8)
        assert [leg.engine for leg in answer.legs] == [suite.first.name]
        assert answer.usage.output_token_count == 8


async def test_a_program_goes_on_after_what_it_handed_on(tmp_path: Path) -> None:
    body = """
        yield fleet.least_loaded(request).start_generate(request)
        said.append("over")
    """
    async with running(policy=program(tmp_path, body)) as suite:
        await suite.generate()
        assert said(suite) == ["over"]


async def test_a_failure_is_raised_where_the_program_handed_the_sequence_on(tmp_path: Path) -> None:
    body = """
        one, two = fleet.engines
        try:
            yield one.start_generate(request)
        except Exception as error:
            said.append(error.reason)
            yield two.start_generate(request)
    """
    async with running(policy=program(tmp_path, body)) as suite:
        suite.first.faults["StartGenerate"] = Fault(FakeError("not here"))
        answer = await suite.generate()
        assert list(answer.token_ids) == model().generate(PROMPT, 8)
        assert answer.legs[-1].engine == suite.engines[1].name
        assert said(suite) == [FakeError.reason]


async def test_a_client_that_leaves_cancels_the_program_where_it_handed_the_sequence_on(tmp_path: Path) -> None:
    body = """
        ended = asyncio.Event()
        said.append(ended)
        try:
            yield fleet.engines[0].start_generate(request)
        except asyncio.CancelledError:
            said.append("cancelled")
            ended.set()
            raise
    """
    async with running(policy=program(tmp_path, body)) as suite:
        call = suite.stream(max_tokens=10_000)
        await first_tokens(call, 1)
        call.cancel()
        ended = said(suite)[0]
        assert isinstance(ended, asyncio.Event)
        await ended.wait()
        assert said(suite)[1:] == ["cancelled"]
        await suite.idle()


async def test_a_stop_string_ends_a_sequence_that_was_handed_on(tmp_path: Path) -> None:
    body = "yield fleet.engines[0].start_generate(request)"
    async with running(policy=program(tmp_path, body)) as suite:
        whole = await suite.generate()
        stop = whole.text[2:4]
        answer = await suite.generate(stop=[stop], max_tokens=10_000)
        assert answer.text == whole.text[: whole.text.index(stop)]
        await suite.idle()


async def test_two_cannot_read_one_sequence_at_once(tmp_path: Path) -> None:
    body = """
        generation = fleet.engines[0].start_generate(request)
        reader = asyncio.ensure_future(anext(generation))
        await asyncio.sleep(0)
        try:
            await anext(generation)
        except RuntimeError as error:
            said.append(str(error))
        yield await reader
        yield generation
    """
    async with running(policy=program(tmp_path, body)) as suite:
        suite.first.gate.clear()
        asked = asyncio.create_task(suite.generate())
        await suite.first.until(lambda: suite.first.sequences)
        suite.first.gate.set()
        assert list((await asked).token_ids) == model().generate(PROMPT, 8)
        assert said(suite) == ["this generation is being read already"]


async def test_what_is_neither_a_chunk_nor_a_sequence_fails_the_request(tmp_path: Path) -> None:
    async with running(policy=program(tmp_path, "yield 'text'")) as suite:
        with failing("ABORTED", "POLICY_FAILED") as caught:
            await suite.generate()
        assert caught.value.message == "policy program yielded str, neither a chunk nor a generation"


async def test_after_its_end_nothing_is_handed_on(tmp_path: Path) -> None:
    body = """
        generation = fleet.engines[0].start_generate(request)
        for _ in range(100):
            yield generation
        said.append("went on")
    """
    async with running(policy=program(tmp_path, body)) as suite:
        answer = await suite.generate()
        assert list(answer.token_ids) == model().generate(PROMPT, 8)
        await suite.idle()
        assert said(suite) == []


async def test_a_sequence_that_is_over_is_no_way_to_keep_the_event_loop(tmp_path: Path) -> None:
    body = """
        generation = fleet.engines[0].start_generate(request)
        await generation.aclose()
        asyncio.get_running_loop().call_soon(said.append, "others")
        for _ in range(100):
            yield generation
        said.append("over")
    """
    async with running(policy=program(tmp_path, body)) as suite:
        with failing("ABORTED", "POLICY_FAILED"):
            await suite.generate()
        assert said(suite) == ["others", "over"]


async def test_a_sequence_that_was_forgotten_half_read_is_cancelled(tmp_path: Path) -> None:
    body = """
        forgotten = fleet.engines[0].start_generate(request)
        said.append((await anext(forgotten)).finish)
        yield fleet.engines[1].start_generate(request)
        said.append(forgotten)
    """
    async with running(policy=program(tmp_path, body)) as suite:
        answer = await suite.generate(max_tokens=5)
        assert list(answer.token_ids) == model().generate(PROMPT, 5)
        await suite.idle()
        assert said(suite)[0] is not FinishReason.CANCELLED


@pytest.mark.parametrize(
    "step",
    ["yield fleet.engines[0].start_generate(replace(request, deadline=0.0))", "yield Chunk()"],
    ids=["what cannot be begun", "nothing"],
)
async def test_a_program_that_hands_on_nothing_for_ever_keeps_nobody_from_their_turn(tmp_path: Path, step: str) -> None:
    body = f"""
        from dataclasses import replace
        from services.router.policies import Chunk
        asyncio.get_running_loop().call_soon(said.append, "others")
        while not said:
            try:
                {step}
            except Exception as error:
                assert error.reason == "DEADLINE_EXCEEDED", error.reason
        yield fleet.engines[0].start_generate(request)
    """
    async with running(policy=program(tmp_path, body)) as suite:
        assert list((await suite.generate()).token_ids) == model().generate(PROMPT, 8)
        assert said(suite) == ["others"]


async def test_a_sequence_that_somebody_still_reads_when_the_request_ends_is_let_go_with_that(tmp_path: Path) -> None:
    body = """
        one, two = fleet.engines
        said.append(asyncio.ensure_future(anext(two.start_generate(request))))
        yield one.start_generate(request)
    """
    async with running(2, policy=program(tmp_path, body)) as suite:
        other = suite.engines[1]
        other.gate.clear()
        await suite.generate()
        [reading] = said(suite)
        assert isinstance(reading, asyncio.Future)
        assert (await reading).finish is FinishReason.CANCELLED
        member = suite.router.registry.members[other.address]
        assert not member.sequences
        assert not member.underway.answers


async def test_a_sequence_that_cannot_be_begun_is_accounted_for(tmp_path: Path) -> None:
    body = """
        from dataclasses import replace
        try:
            yield fleet.engines[0].start_generate(replace(request, deadline=0.0))
        except Exception:
            yield fleet.engines[1].start_generate(request)
    """
    async with running(policy=program(tmp_path, body)) as suite:
        answer = await suite.generate()
        assert [leg.engine for leg in answer.legs] == [engine.name for engine in suite.engines]


async def test_the_account_in_a_chunk_that_was_under_way_when_the_sequence_was_closed_is_kept(tmp_path: Path) -> None:
    body = """
        one, two = fleet.engines
        stream = two.start_generate(request)
        await anext(stream)
        reading = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        await stream.aclose()
        said.append(await reading)
        yield one.start_generate(request)
    """
    async with running(2, policy=program(tmp_path, body)) as suite:
        answer = await suite.generate(max_tokens=1)
        assert said(suite)[0].finish is FinishReason.LENGTH  # type: ignore[attr-defined]
        assert [leg.HasField("timing") for leg in answer.legs] == [True, True]
