"""Sends that a program never awaited: told where something waits for them, and over no other error."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent, indent

import pytest

from services.router.config import RouterConfig
from services.router.programs.runner import RunLimits
from tests.router.harness import PROMPT, failing, model, running

pytestmark = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")


@pytest.fixture(autouse=True)
def drop() -> Iterator[None]:
    """What a failed request still holds goes here, where its warning is expected, and not in some later test."""
    yield
    gc.collect()


HEADER = """\
import asyncio
from services.router.errors import NoPair
from services.router.policies import TokenRange

async def policy(request, fleet):
    prefill, decode = fleet.pair(request)
    async with decode.prep_recv(request, end=50) as kv:
"""
FIRST = HEADER.count("\n") + 1  # the body's first line
GENERATE = "yield decode.start_generate(request, begin=50, kv=kv)"


def program(folder: Path, body: str, then: str = GENERATE) -> str:
    path = folder / "forgetful.py"
    path.write_text(HEADER + indent(dedent(body).strip() + "\n" + then, " " * 8) + "\n")
    return str(path)


READ = "async for chunk in decode.start_generate(request, begin=50, kv=kv):\n    yield chunk"


@pytest.mark.parametrize("then", [GENERATE, READ], ids=["handed on", "read"])
@pytest.mark.parametrize(
    "before", ["", "await prefill.remote_send(request, kv, TokenRange(0, 48)); "], ids=["all", "part"]
)
async def test_what_nothing_will_fill_is_told_at_once(before: str, then: str, tmp_path: Path) -> None:
    body = f"{before}prefill.remote_send(request, kv, TokenRange({48 if before else 0}, 50))"
    async with running(policy=program(tmp_path, body, then)) as suite:
        with failing("ABORTED", "POLICY_FAILED") as caught:
            await suite.generate()
        assert caught.value.message == f"policy forgetful called remote_send at line {FIRST} without await"
        await suite.idle()


@pytest.mark.parametrize(
    "body",
    [
        "kept = prefill.remote_send(request, kv)",
        "prefill.remote_send(request, kv)\nawait asyncio.Event().wait()",
    ],
    ids=["kept", "waited for otherwise"],
)
async def test_what_may_still_come_is_told_when_the_time_is_over(
    body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RouterConfig, "run_limits", RunLimits(between_chunks_s=0.1, after_cancel_s=0.1))
    async with running(policy=program(tmp_path, body)) as suite:
        with failing("DEADLINE_EXCEEDED", "POLICY_TIMEOUT") as caught:
            await suite.generate()
        assert caught.value.message.endswith(f"; it called remote_send at line {FIRST} without await")


async def test_a_program_that_ends_without_an_answer_is_told(tmp_path: Path) -> None:
    body = "prefill.remote_send(request, kv)\nreturn"
    async with running(policy=program(tmp_path, body)) as suite:
        with failing("ABORTED", "POLICY_FAILED") as caught:
            await suite.generate()
        told = f"policy forgetful yielded nothing; it called remote_send at line {FIRST} without await"
        assert caught.value.message == told


async def test_the_programs_own_error_is_told(tmp_path: Path) -> None:
    body = "await asyncio.gather(prefill.remote_send(request, kv), fleet.engines[9].remote_send(request, kv))"
    async with running(policy=program(tmp_path, body)) as suite:
        with failing("ABORTED", "POLICY_FAILED") as caught:
            await suite.generate()
        assert caught.value.message == f"policy forgetful raised IndexError at line {FIRST}"


NO_MISTAKE = {
    "an error that the router knows a remedy for": """
        def peer():
            raise NoPair("none", cause="ONE_ENGINE")
        await asyncio.gather(prefill.remote_send(request, kv), peer().remote_send(request, kv))
    """,
    "an error that the program handles": """
        try:
            await asyncio.gather(prefill.remote_send(request, kv), fleet.engines[9].remote_send(request, kv))
        except IndexError:
            await prefill.remote_send(request, kv)
    """,
    "closed": """
        prefill.remote_send(request, kv).close()
        await prefill.remote_send(request, kv)
    """,
    "cancelled before its first step": """
        sending = asyncio.ensure_future(prefill.remote_send(request, kv))
        sending.cancel()
        await asyncio.wait({sending})
        sending = asyncio.ensure_future(prefill.remote_send(request, kv))
    """,
}


@pytest.mark.parametrize("body", NO_MISTAKE.values(), ids=NO_MISTAKE)
async def test_a_send_that_is_dropped_may_be_no_mistake(body: str, tmp_path: Path) -> None:
    async with running(policy=program(tmp_path, body)) as suite:
        assert list((await suite.generate()).token_ids) == model().generate(PROMPT, 8)
