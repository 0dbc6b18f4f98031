"""The OpenAI-compatible door: failures on the way, clients that leave, and the end of the router."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress

import openai
import pytest
from tokenizers import Tokenizer

from services.router.answer import Answer
from services.router.asking import Ask
from services.router.errors import InvalidRequest
from services.router.metrics import REQUESTS_IN_FLIGHT
from services.router.openai.shapes import CompletionShape
from tests.fakes import FakeModel, Fault
from tests.router.openai_client import serving
from tests.router.vocabularies import byte_level, files


async def test_a_failure_on_the_way_is_the_last_event() -> None:
    async with serving() as (suite, client):
        suite.first.faults["StartGenerate"] = Fault(InvalidRequest("told to fail"), after_tokens=3)
        stream = await client.completions.create(model="fake", prompt="x", max_tokens=8, stream=True)
        with pytest.raises(openai.APIError, match="told to"):
            async for _ in stream:
                pass


async def test_a_bug_shows_nothing_of_itself(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as (suite, client):
        monkeypatch.setattr(suite.router.registry, "models", lambda: 1 / 0)
        with pytest.raises(openai.InternalServerError) as caught:
            await client.models.list()
        assert "division" not in str(caught.value)
        [record] = [record for record in caplog.records if record.message == "call failed"]
        assert record.fields["failure"] in str(caught.value)  # type: ignore[attr-defined]


async def test_a_bug_in_the_middle_of_a_stream_ends_it_and_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving() as (_, client):
        monkeypatch.setattr(CompletionShape, "closing", lambda *_: 1 / 0)
        stream = await client.completions.create(
            model="fake", prompt="x", stream=True, stream_options={"include_usage": True}
        )
        with pytest.raises(openai.APIConnectionError):
            async for _ in stream:
                pass
        assert [record.message for record in caplog.records if record.exc_info] == ["call failed"]


async def test_all_prompts_of_a_call_have_room_before_the_first_begins() -> None:
    async with serving(max_requests=3) as (suite, client):
        suite.first.gate.clear()
        one = asyncio.create_task(client.completions.create(model="fake", prompt="x"))
        await suite.first.until(lambda: suite.first.sequences)
        with pytest.raises(openai.RateLimitError):
            await client.completions.create(model="fake", prompt=["a", "b", "c"])
        assert len(suite.first.called("Session")) == 1  # no engine was asked for any of them
        suite.first.gate.set()
        await one
        assert len((await client.completions.create(model="fake", prompt=["a", "b", "c"])).choices) == 3
        with pytest.raises(openai.BadRequestError):
            await client.completions.create(model="fake", prompt=["a", "b"], n=2)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_ends_its_work(stream: bool) -> None:
    async with serving() as (suite, client):
        suite.first.gate.clear()
        asking = asyncio.create_task(client.completions.create(model="fake", prompt="x", n=3, stream=stream))
        await suite.first.until(lambda: suite.first.sequences)
        asking.cancel()
        await suite.idle()
        assert suite.first.called("Cancel")


async def test_a_reader_that_leaves_in_the_middle_ends_its_work() -> None:
    async with serving() as (suite, client):
        suite.first.faults["StartGenerate"] = Fault(after_tokens=3)  # each stands then, and does not end
        stream = await client.completions.create(model="fake", prompt="x", n=2, stream=True)
        pieces = aiter(stream)
        while (await anext(pieces)).choices[0].index != 1:
            pass
        await stream.close()
        await suite.idle()
        assert len(suite.first.called("Cancel")) == 2


@pytest.mark.slow
async def test_a_reader_that_takes_nothing_stalls_nobody_and_is_cut_off() -> None:
    wordy = Tokenizer.from_str(byte_level().to_str())
    wordy.add_tokens(["x" * 2000])  # so that the connection is soon full
    endless = FakeModel(files(wordy), script=(wordy.token_to_id("x" * 2000),) * 90_000, max_context=100_000)
    async with serving(fake_model=endless, max_buffered_tokens=5000, client_timeout=0.5) as (suite, client):
        body = b'{"model": "fake", "stream": true, "messages": [{"role": "user", "content": "x"}]}'
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        host, port = suite.http.split(":")
        with socket.create_connection((host, int(port))) as reader:
            reader.sendall(head.encode() + body)
            await suite.first.until(lambda: suite.first.sequences)
            for _ in range(3):
                await client.completions.create(model="fake", prompt="x", max_tokens=1)
            await suite.idle()
            async with asyncio.timeout(60):
                while REQUESTS_IN_FLIGHT.collect()[0].samples[0].value:
                    await client.models.list()
            assert b"[DONE]" not in await asyncio.to_thread(rest, reader)


@pytest.mark.slow
async def test_a_reader_that_is_late_gets_all_of_it() -> None:
    """More than connection and router write ahead of it."""
    wordy, num_tokens = Tokenizer.from_str(byte_level().to_str()), 5000
    wordy.add_tokens(["x" * 2000])
    speaker = FakeModel(files(wordy), script=(wordy.token_to_id("x" * 2000),) * num_tokens, max_context=10_000)
    async with serving(fake_model=speaker, max_buffered_tokens=10_000, client_timeout=600) as (suite, _):
        body = f'{{"model": "fake", "stream": true, "prompt": "x", "max_tokens": {num_tokens}}}'
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        host, port = suite.http.split(":")
        with socket.create_connection((host, int(port))) as reader:
            reader.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            await suite.first.until(lambda: suite.first.called("Session"))
            await suite.idle()  # it has said everything, and nobody has read anything
            received = await asyncio.to_thread(rest, reader)
        assert received.count(b"x" * 2000) == num_tokens
        assert received.count(b'"finish_reason":"length"') == 1
        assert received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


def rest(reader: socket.socket) -> bytes:
    """Everything until the connection ends."""
    received = b""
    with suppress(ConnectionError):
        while data := reader.recv(1 << 20):
            received += data
    return received


async def test_a_request_under_way_outlives_the_drain() -> None:
    async with serving() as (suite, client):
        suite.first.gate.clear()
        asking = asyncio.create_task(client.completions.create(model="fake", prompt="x"))
        await suite.first.until(lambda: suite.first.sequences)
        draining = asyncio.create_task(suite.router._drain())
        await asyncio.sleep(0)
        with pytest.raises(openai.InternalServerError) as caught:
            await client.completions.create(model="fake", prompt="x")
        assert (caught.value.status_code, caught.value.code) == (503, "draining")
        assert not draining.done()
        suite.first.gate.set()
        assert (await asking).choices
        await draining


async def test_what_outlives_the_grace_is_told_so() -> None:
    async with serving() as (suite, client):
        suite.first.faults["StartGenerate"] = Fault(after_tokens=3)  # each stands then, and does not end
        whole = asyncio.create_task(client.completions.create(model="fake", prompt="x"))
        pieces = aiter(await client.completions.create(model="fake", prompt="x", stream=True))
        await anext(pieces)
        await suite.first.until(lambda: len(suite.first.sequences) == 2)
        await suite.router._http.close()
        with pytest.raises(openai.InternalServerError) as caught:
            await whole
        assert (caught.value.status_code, caught.value.code) == (503, "draining")
        with pytest.raises(openai.APIError, match="the server stopped") as told:
            async for _ in pieces:
                pass
        assert told.value.code == "draining"
        await suite.idle()


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_cancellation_that_nobody_asked_for_is_a_failure_of_the_router(
    after: int, stream: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving() as (suite, client):
        service = suite.router._http_app._service
        deliver = service.deliver

        async def cancelled(ask: Ask, take: Callable[[Answer], bool], wait: Callable[[], Awaitable[None]]) -> None:
            """As if a task were cancelled that it waits for."""
            left = iter(range(after))

            def take_some(answer: Answer) -> bool:
                if next(left, None) is None:
                    raise InvalidRequest("enough")
                return take(answer)

            with suppress(Exception):
                await deliver(ask, take_some, wait)
            raise asyncio.CancelledError

        monkeypatch.setattr(service, "deliver", cancelled)

        async def ask() -> None:
            answer = await client.completions.create(model="fake", prompt="x", max_tokens=8, stream=stream)
            async for _ in aiter(answer):  # type: ignore[arg-type]
                pass

        with pytest.raises(openai.APIError) as caught:
            await ask()
        assert caught.value.code == "internal"
        [record] = [record for record in caplog.records if record.message == "call failed"]
        assert record.fields["failure"] in str(caught.value)  # type: ignore[attr-defined]


async def test_a_failing_choice_ends_all() -> None:
    async with serving(2) as (suite, client):
        for engine in suite.engines:
            engine.faults["StartGenerate"] = Fault(InvalidRequest("told to fail"), after_tokens=3)
        with pytest.raises(openai.APIStatusError):
            await client.completions.create(model="fake", prompt="x", n=3)
        await suite.idle()
