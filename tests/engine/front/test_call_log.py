"""Verbs in the log, by the names that their callers and the callers' clients have for them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import grpc
import pytest

from services.engine.core import api
from services.engine.core.api import StartGenerate
from services.engine.errors import NoPages, StepFailed
from services.engine.front import call_log
from services.engine.front.limits import MAX_NAME_CHARACTERS
from tests.e2e.errors import failing
from tests.engine.front.harness import OWNER, Served, output, serve, start_request
from tests.engine.front.readers import CompleteReader, SessionReader, StartGenerateReader
from tests.engine.front.session_calls import RESERVED, by_itself
from tests.engine.front.test_servicer import prep, send

READERS = [StartGenerateReader, SessionReader, CompleteReader]
Reader = type[StartGenerateReader] | type[SessionReader]


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serve() as served:
        yield served


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG, call_log.log.name)
    return caplog


def ended(caplog: pytest.LogCaptureFixture) -> list[tuple[str, dict[str, str]]]:
    """Level and fields of what was logged of verbs."""
    records = [record for record in caplog.records if record.name == call_log.log.name]
    return [(record.levelname, record.fields) for record in records]  # type: ignore[attr-defined]


def fields(verb: str, outcome: str, request: str) -> dict[str, str]:
    return {"verb": verb, "outcome": outcome, "request": request, "owner": OWNER, "call": "r1"}


@pytest.mark.parametrize("reader", READERS)
async def test_a_sequence_is_told_of_when_it_ends(
    served: Served, reader: Reader, told: pytest.LogCaptureFixture
) -> None:
    reading = reader(served.stub, start_request(client_request_id="of a client"))
    command = await served.engine.next(StartGenerate)
    served.engine.step(output(command, 10))
    served.engine.step(output(command, 12, finish_reason="STOP"))
    await reading.result()
    assert ended(told) == [("DEBUG", fields("StartGenerate", "STOP", "of a client"))]


async def test_what_the_engine_is_to_blame_for_is_told_at_any_level(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    for error in (NoPages("No pages are free."), StepFailed("The engine failed to compute a step.")):
        reading = StartGenerateReader(served.stub, start_request(client_request_id="of a client"))
        served.engine.step(output(await served.engine.next(StartGenerate), error=error))
        await reading.result()
    assert ended(caplog) == [("WARNING", fields("StartGenerate", StepFailed.reason, "of a client"))]


async def test_a_caller_that_leaves(served: Served, told: pytest.LogCaptureFixture) -> None:
    reading = StartGenerateReader(served.stub, start_request(client_request_id="of a client"))
    await served.engine.next(StartGenerate)
    await reading.cancel()
    await served.engine.next(api.Cancel)
    assert ended(told) == [("DEBUG", fields("StartGenerate", "CANCELLED", "of a client"))]


@pytest.mark.parametrize("reader", READERS)
async def test_a_start_that_is_refused(served: Served, reader: Reader, told: pytest.LogCaptureFixture) -> None:
    live = StartGenerateReader(served.stub, start_request(client_request_id="of a client"))
    await served.engine.next(StartGenerate)
    for wrong, outcome in (
        ({}, "SEQUENCE_EXISTS"),
        ({"forced_token_ids": [7]}, "REQUEST_ID_REUSED"),
        ({"cache_salt": "x" * 10_000}, "BAD_REQUEST"),
    ):
        told.clear()
        await reader(served.stub, start_request(client_request_id="of a client", **wrong)).result()
        assert ended(told) == [("DEBUG", fields("StartGenerate", outcome, "of a client"))]
    await live.cancel()


async def test_the_other_verbs(served: Served, told: pytest.LogCaptureFixture) -> None:
    left = asyncio.ensure_future(by_itself(served, send(client_request_id="of a client")))
    await served.engine.next(api.RemoteSend)
    left.cancel()
    await served.engine.next(api.Cancel)
    for answer in (RESERVED, NoPages("No pages are free.")):
        call = asyncio.ensure_future(by_itself(served, prep(client_request_id="of a client")))
        (await served.engine.next(api.PrepRecv)).reply(answer)
        await asyncio.gather(call, return_exceptions=True)
    outcomes = (("RemoteSend", "CANCELLED"), ("PrepRecv", "OK"), ("PrepRecv", NoPages.reason))
    assert ended(told) == [("DEBUG", fields(*each, "of a client")) for each in outcomes]


async def test_a_long_name_is_cut(served: Served) -> None:
    StartGenerateReader(served.stub, start_request(client_request_id="x" * 1000))
    assert (await served.engine.next(StartGenerate)).key.client_request_id == "x" * MAX_NAME_CHARACTERS


async def test_a_retry_may_have_another_name_at_the_client(served: Served) -> None:
    StartGenerateReader(served.stub, start_request(client_request_id="one"))
    await served.engine.next(StartGenerate)
    with failing(grpc.StatusCode.ALREADY_EXISTS, "SEQUENCE_EXISTS"):
        await served.stub.StartGenerate(start_request(client_request_id="other")).read()
