"""Verbs that fail in programs: whose fault it is, and where."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import dedent, indent

import pytest

from services.protocol.errors import OutsideWindow, ReservationGone, ServiceError, UnknownReservation
from tests.fakes import FakeBug, FakeError, Fault
from tests.router.harness import PROMPT, failing, model, running, verbs
from tests.router.programs import write

ROOT = Path(__file__).resolve().parents[2]
FAILED = ("ABORTED", "POLICY_FAILED")


async def test_a_program_may_use_task_groups_and_keeps_the_engines_error(tmp_path: Path) -> None:
    body = dedent("""
        prefill, decode = fleet.pair(request)
        async with decode.prep_recv(request, end=50) as kv, asyncio.TaskGroup() as group:
            group.create_task(prefill.remote_send(request, kv))
            async for chunk in decode.start_generate(request, begin=50, kv=kv):
                yield chunk
    """).replace("\n", "\n    ")
    path = write(tmp_path, "overlapping", body)
    async with running(policy=str(path)) as suite:
        answer = await suite.generate()
        assert list(answer.token_ids) == model().generate(PROMPT, 8)
        assert [verb for verb, *_ in verbs(answer)] == ["prep_recv", "start_generate", "remote_send"]
        suite.first.faults["RemoteSend"] = Fault(FakeBug("no sending today"))
        with failing("INTERNAL", "INTERNAL"):
            await suite.generate(cache_salt="other")


async def test_a_failed_send_can_be_tried_again_with_the_next_attempt(tmp_path: Path) -> None:
    body = dedent("""
        prefill, decode = fleet.pair(request)
        async with decode.prep_recv(request, end=50) as kv:
            try:
                await prefill.remote_send(request, kv)
            except Exception:
                prefill.info.labels["repair"]()
                await prefill.remote_send(request, kv)
            async for chunk in decode.start_generate(request, begin=50, kv=kv):
                yield chunk
    """).replace("\n", "\n    ")
    path = write(tmp_path, "retrying", body)
    async with running(policy=str(path)) as suite:
        sender = suite.first
        sender.faults["RemoteSend"] = Fault(FakeError("not the first time"))
        suite.router.registry.members[sender.address].info.labels["repair"] = sender.faults.clear
        assert list((await suite.generate()).token_ids) == model().generate(PROMPT, 8)
        assert [sent.attempt for sent in sender.called("RemoteSend")] == [1, 2]


MISUSE = {
    "a_negative_end": "    async with decode.prep_recv(request, end=-1):\n        yield",
    "the_reservation_of_another_engine": (
        "    async with decode.prep_recv(request, end=50) as kv:\n        await prefill.remote_send(request, kv)\n"
        "        yield prefill.start_generate(request, begin=50, kv=kv)"
    ),
    "a_range_in_a_task": (
        "    from services.router.policies import TokenRange\n"
        "    async with decode.prep_recv(request, end=40) as kv:\n"
        "        async with asyncio.TaskGroup() as group:\n"
        "            group.create_task(prefill.remote_send(request, kv, TokenRange(0, 50)))\n"
        "        yield decode.start_generate(request, begin=40, kv=kv)"
    ),
    "a_reservation_that_was_released": (
        "    async with decode.prep_recv(request, end=50) as kv:\n        await prefill.remote_send(request, kv)\n"
        "    yield decode.start_generate(request, begin=50, kv=kv)"
    ),
}


@pytest.mark.parametrize("name", MISUSE)
async def test_what_a_program_gives_a_verb_is_not_the_clients_fault(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, name, "    prefill, decode = fleet.pair(request)\n" + MISUSE[name])
    async with running(policy=str(path)) as suite:
        with failing(*FAILED) as caught:
            await suite.generate()
        assert re.match(
            rf"policy {name} called a verb at line \d+ that was refused: .+ \([A-Z_]+\)", caught.value.message
        )


async def test_of_a_group_the_line_is_told_that_its_error_came_through(tmp_path: Path) -> None:
    body = """\
        from services.router.policies import TokenRange
        async def other():
            raise ValueError
        async def send(kv):
            await prefill.remote_send(request, kv, TokenRange(0, 50))
        prefill, decode = fleet.pair(request)
        async with decode.prep_recv(request, end=40) as kv:
            try:
                await send(kv)
            except Exception as error:
                raise ExceptionGroup("both", [await asyncio.gather(other(), return_exceptions=True)][0] + [error])
            yield
    """
    path = write(tmp_path, "group", indent(dedent(body), "    "))
    line = next(i for i, text in enumerate(path.read_text().splitlines(), 1) if "TokenRange(0, 50)" in text)
    async with running(policy=str(path)) as suite:
        with failing(*FAILED) as caught:
            await suite.generate()
        assert f"called a verb at line {line} that was refused" in caught.value.message


async def test_a_range_that_the_program_made_wrong_is_no_verbs_refusal(tmp_path: Path) -> None:
    path = write(
        tmp_path, "wrong", "    from services.router.policies import TokenRange\n    TokenRange(5, 3)\n    yield"
    )
    async with running(policy=str(path)) as suite:
        with failing(*FAILED) as caught:
            await suite.generate()
        assert re.fullmatch(r"policy wrong raised InvalidRange at line \d+", caught.value.message)


@pytest.mark.parametrize("error", [ReservationGone("the lease ran out"), UnknownReservation("none of that id")])
async def test_a_reservation_that_is_lost_is_no_fault_of_the_program(error: ServiceError, tmp_path: Path) -> None:
    path = write(tmp_path, "good", (ROOT / "docs/examples/hello_policy.py").read_text().partition("fleet):")[2])
    async with running(policy=str(path)) as suite:
        for engine in suite.engines:
            engine.faults["RemoteSend"] = Fault(error)
        with failing(error.code.name, error.reason):
            await suite.generate()


async def test_a_built_in_program_is_never_blamed() -> None:
    async with running(policy="disaggregated") as suite:
        for engine in suite.engines:
            engine.faults["RemoteSend"] = Fault(OutsideWindow("not in the window"))
        with failing("OUT_OF_RANGE", "OUTSIDE_WINDOW"):
            await suite.generate()
