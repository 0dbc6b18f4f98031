"""The OpenAI-compatible door, used through the official client."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import openai
import pytest
from tokenizers import Tokenizer

from services.router.errors import InvalidRequest
from services.router.metrics import REQUESTS_IN_FLIGHT
from services.router.openai.shapes import CompletionShape
from tests.fakes import FakeModel, Fault
from tests.router.harness import PROMPT, Running, running, script
from tests.router.test_http import fetch, get
from tests.router.vocabularies import byte_level, files

STORY = "the quick brown größe 🙂🙃 jumps over 你好 the lazy dog"
USER: Any = [{"role": "user", "content": "hello"}]


@asynccontextmanager
async def serving(
    num_engines: int = 1, *, key: str = "any", **options: Any
) -> AsyncIterator[tuple[Running, openai.AsyncOpenAI]]:
    """A router over fake engines, and a client of its HTTP door that tries nothing twice."""
    async with running(num_engines, http_listen="127.0.0.1:0", **options) as suite:
        base = f"http://{suite.http}/v1"
        async with openai.AsyncOpenAI(base_url=base, api_key=key, max_retries=0, timeout=20) as client:
            yield suite, client


async def test_a_chat_in_one_piece() -> None:
    async with serving(fake_model=script(STORY)) as (suite, client):
        answer = await client.chat.completions.create(model="fake", messages=USER)
        assert answer.object == "chat.completion"
        assert (answer.model, answer.id[:9]) == ("fake", "chatcmpl-")
        [choice] = answer.choices
        assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", STORY, "stop")
        assert choice.logprobs is None
        assert answer.usage is not None
        num_tokens = len(byte_level().encode(STORY).ids)
        [start] = suite.first.called("Session")
        assert answer.usage.completion_tokens == num_tokens
        assert answer.usage.prompt_tokens == len(start.prompt_token_ids)
        assert answer.usage.total_tokens == num_tokens + len(start.prompt_token_ids)
        template = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
        assert list(start.prompt_token_ids) == byte_level().encode(template).ids
        again = await client.chat.completions.create(model="fake", messages=USER)
        assert again.usage is not None
        assert again.usage.prompt_tokens_details is not None
        assert (again.usage.prompt_tokens_details.cached_tokens or 0) > 0


async def test_a_chat_in_pieces() -> None:
    async with serving(fake_model=script(STORY)) as (_, client):
        stream = await client.chat.completions.create(
            model="fake", messages=USER, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
        assert len({chunk.id for chunk in chunks}) == 1
        *pieces, last = chunks
        assert [chunk.usage for chunk in pieces] == [None] * len(pieces)
        assert last.choices == []
        assert last.usage is not None
        assert last.usage.completion_tokens == len(byte_level().encode(STORY).ids)
        deltas = [chunk.choices[0].delta for chunk in pieces]
        assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
        assert "".join(delta.content or "" for delta in deltas) == STORY
        assert [chunk.choices[0].finish_reason for chunk in pieces] == [None] * (len(pieces) - 1) + ["stop"]
        assert len(pieces) > 5


async def test_a_completion_in_one_piece_and_in_pieces() -> None:
    async with serving(fake_model=script(STORY)) as (_, client):
        whole = await client.completions.create(model="fake", prompt="hello", max_tokens=100)
        assert (whole.object, whole.choices[0].text, whole.choices[0].finish_reason) == (
            "text_completion",
            STORY,
            "stop",
        )
        stream = await client.completions.create(model="fake", prompt="hello", max_tokens=100, stream=True)
        pieces = [piece async for piece in stream]
        assert "".join(piece.choices[0].text for piece in pieces) == STORY
        assert all(piece.usage is None for piece in pieces)


async def test_a_completion_of_token_ids_is_short_unless_told() -> None:
    async with serving() as (_, client):
        short = await client.completions.create(model="fake", prompt=list(PROMPT))
        assert short.usage is not None
        assert (short.usage.prompt_tokens, short.usage.completion_tokens) == (len(PROMPT), 16)
        assert short.choices[0].finish_reason == "length"


async def test_several_prompts_and_several_choices() -> None:
    async with serving(2) as (_, client):
        prompts: Any = [[10, 11, 12, 13], [20, 21, 22]]
        answer = await client.completions.create(
            model="fake", prompt=prompts, n=3, max_tokens=4, seed=7, temperature=1, stream=False
        )
        assert [choice.index for choice in answer.choices] == list(range(6))
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (7, 24)
        texts = [choice.text for choice in answer.choices]
        assert len(set(texts)) == 6
        alone = await client.completions.create(
            model="fake", prompt=prompts[1], max_tokens=4, seed=7, temperature=1, stream=False
        )
        assert alone.choices[0].text == texts[3]
        stream = await client.completions.create(
            model="fake", prompt=prompts, n=3, max_tokens=4, seed=7, temperature=1, stream=True
        )
        streamed = [""] * 6
        async for piece in stream:
            streamed[piece.choices[0].index] += piece.choices[0].text
        assert streamed == texts


async def test_choices_share_the_engine_that_has_the_prompt() -> None:
    async with serving(2, policy="disaggregated") as (suite, client):
        answer = await client.chat.completions.create(model="fake", messages=USER, n=4, max_tokens=4)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        starts = {engine.name: len(engine.called("Session")) for engine in suite.engines}
        assert sorted(starts.values()) == [0, 4]
        assert sum(len(engine.called("RemoteSend")) for engine in suite.engines) == 1
        seeds = {start.sampling.seed for engine in suite.engines for start in engine.called("Session")}
        assert len(seeds) == 4


async def test_log_probabilities() -> None:
    async with serving(fake_model=script("größe 🙂")) as (_, client):
        chat = await client.chat.completions.create(model="fake", messages=USER, logprobs=True, top_logprobs=0)
        assert chat.choices[0].logprobs is not None
        content = chat.choices[0].logprobs.content
        assert content is not None
        assert bytes(byte for each in content for byte in each.bytes or []).decode() == "größe 🙂"
        assert {each.logprob for each in content} == {-0.5}
        stream = await client.chat.completions.create(model="fake", messages=USER, logprobs=True, stream=True)
        streamed: list[int] = []
        async for piece in stream:
            if piece.choices[0].logprobs is not None:
                for token in piece.choices[0].logprobs.content or []:
                    streamed += token.bytes or []
        assert bytes(streamed).decode() == "größe 🙂"
        completion = await client.completions.create(model="fake", prompt="x", logprobs=1)
        assert completion.choices[0].logprobs is not None
        assert any(token.startswith("bytes:") for token in completion.choices[0].logprobs.tokens or [])


@pytest.mark.parametrize("stream", [False, True])
async def test_offsets_of_tokens_are_those_of_their_text(stream: bool) -> None:
    text = "größe 🙂 and so on"
    async with serving(fake_model=script(text)) as (_, client):
        # The stop string holds text back, so that it comes later than its tokens.
        answer = await client.completions.create(
            model="fake", prompt="x", logprobs=1, max_tokens=99, stop="and so far", stream=stream
        )
        tokens: list[str] = []
        offsets: list[int] = []
        for piece in [each async for each in answer] if isinstance(answer, openai.AsyncStream) else [answer]:
            if piece.choices[0].logprobs is not None:
                tokens += piece.choices[0].logprobs.tokens or []
                offsets += piece.choices[0].logprobs.text_offset or []
        assert len(tokens) == len(offsets) == len(byte_level().encode(text).ids)
        assert offsets == [0, 5, *range(6, len(text))]  # "größe", half of " 🙂", its other half, and letters
        assert (tokens[0], tokens[2][:6], tokens[-1]) == ("größe", "bytes:", "n")


async def test_echo() -> None:
    async with serving(fake_model=script(" world")) as (_, client):
        text = await client.completions.create(model="fake", prompt="hello", echo=True, n=2)
        assert [choice.text for choice in text.choices] == ["hello world"] * 2
        tokens = await client.completions.create(model="fake", prompt=byte_level().encode("hello").ids, echo=True)
        assert tokens.choices[0].text == "hello world"


async def test_sampling_reaches_the_engine() -> None:
    async with serving() as (suite, client):
        await client.chat.completions.create(
            model="fake",
            messages=USER,
            temperature=0.5,
            top_p=0.25,
            presence_penalty=-1,
            frequency_penalty=1,
            logit_bias={"5": 2},
            seed=-3,
            max_completion_tokens=2,
            user="somebody",
            response_format={"type": "text"},
            extra_body={"top_k": 7, "min_p": 0.125, "repetition_penalty": 1.5, "ignore_eos": True, "min_tokens": 1},
        )
        await client.chat.completions.create(model="fake", messages=USER, max_tokens=3)
        first, second = (start.sampling for start in suite.first.called("Session"))
        assert (first.temperature, first.top_p, first.top_k, first.min_p) == (0.5, 0.25, 7, 0.125)
        assert (first.presence_penalty, first.frequency_penalty, first.repetition_penalty) == (-1, 1, 1.5)
        assert (dict(first.logit_bias), first.seed, first.max_tokens) == ({5: 2.0}, 2**64 - 3, 2)
        assert (first.ignore_eos, first.min_tokens) == (True, 1)
        assert (second.temperature, second.top_p, second.max_tokens) == (1.0, 1.0, 3)


async def test_response_formats_reach_the_engine() -> None:
    schema = {"type": "object", "properties": {"größe": {"type": "integer"}}}
    named = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    formats: list[Any] = [{"type": "text"}, {"type": "json_object"}, named]
    async with serving() as (suite, client):
        for each in formats:
            await client.chat.completions.create(model="fake", messages=USER, max_tokens=1, response_format=each)
        guides = [start.sampling.guide for start in suite.first.called("Session")]
        assert [guide.WhichOneof("kind") for guide in guides] == [None, "json_schema", "json_schema"]
        assert [json.loads(guide.json_schema) for guide in guides[1:]] == [{"type": "object"}, schema]


async def test_stop_strings() -> None:
    async with serving(fake_model=script(STORY)) as (_, client):
        for stop in ("n grö", ["zzz", "n grö"]):
            answer = await client.completions.create(model="fake", prompt="x", max_tokens=100, stop=stop)
            assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("the quick brow", "stop")


async def test_the_policy_is_chosen_by_a_header_and_the_request_named() -> None:
    async with serving(2) as (suite, client):
        headers = {"x-microserve-policy": "disaggregated", "x-request-id": "mine"}
        answer = await client.completions.with_raw_response.create(
            model="fake", prompt=list(PROMPT), extra_headers=headers
        )
        assert answer.headers["x-request-id"] == "mine"
        assert sum(len(engine.called("RemoteSend")) for engine in suite.engines) == 1


async def test_models() -> None:
    async with serving() as (_, client):
        assert [each.id async for each in client.models.list()] == ["fake"]
        assert (await client.models.retrieve("fake")).object == "model"
        with pytest.raises(openai.NotFoundError) as caught:
            await client.models.retrieve("some/other")
        assert caught.value.code == "model_not_found"


async def test_keys() -> None:
    async with serving(api_key=("first", "second"), key="second") as (suite, client):
        await client.models.list()
        for wrong in ("x", "secon", "secondd", "second first"):
            with pytest.raises(openai.AuthenticationError) as caught:
                await client.with_options(api_key=wrong).models.list()
            assert caught.value.code == "invalid_api_key"
        for head in ("", "Authorization: second\r\n", "Authorization: Basic second\r\n", "Authorization: \xff\r\n"):
            status, _ = await fetch(suite.http, f"GET /v1/models HTTP/1.1\r\n{head}Connection: close\r\n\r\n")
            assert status == 401
        assert (await get(suite.http, "/health"))[0] == 200
        assert suite.first.called("Session") == []


@pytest.mark.parametrize(
    ("options", "param", "code"),
    [
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_value"),
        ({"temperature": True}, "temperature", "invalid_value"),
        ({"top_p": -0.1}, "top_p", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 129}, "n", "invalid_value"),
        ({"n": 10**400}, "n", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 1.5}, "max_tokens", "invalid_value"),
        ({"seed": 2**64}, "seed", "invalid_value"),
        ({"stop": [1]}, "stop", "invalid_value"),
        ({"stream": "yes"}, "stream", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1", "invalid_value"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"messages": "hello"}, "messages", "invalid_value"),
        ({"messages": [1]}, "messages[0]", "invalid_value"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]", "unsup"),
        ({"messages": [{"role": "user", "content": "x", "what": 1}]}, "messages[0].what", "unknown_parameter"),
        ({"messages": []}, None, "empty_prompt"),
        ({"stop": "x" * 257}, None, "invalid_request"),
        ({"tools": [{"type": "function"}]}, "tools", "unsup"),
        ({"response_format": {"type": "yaml"}}, "response_format.type", "invalid_value"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "invalid_value"),
        ({"response_format": {"type": "text", "x": 1}}, "response_format.x", "unknown_parameter"),
        ({"modalities": ["audio"]}, "modalities", "unsup"),
        ({"tempreature": 1}, "tempreature", "unknown_parameter"),
        ({"model": "nope"}, None, "model_not_found"),
    ],
)
async def test_what_a_chat_is_refused_for(options: dict[str, Any], param: str | None, code: str) -> None:
    async with serving() as (suite, client):
        body = {"model": "fake", "messages": USER} | options
        with pytest.raises(openai.APIStatusError) as caught:
            await client.post("/chat/completions", body=body, cast_to=object)
        assert caught.value.status_code == (404 if code == "model_not_found" else 400)
        assert caught.value.body is not None
        assert caught.value.param == param
        assert str(caught.value.code).startswith(code)
        assert caught.value.type in ("invalid_request_error", "not_found_error")
        assert suite.first.called("Session") == []


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"prompt": None}, "invalid_value"),
        ({"prompt": ""}, "empty_prompt"),
        ({"prompt": []}, "invalid_value"),
        ({"prompt": [[]]}, "empty_prompt"),
        ({"prompt": [1, "x"]}, "invalid_value"),
        ({"prompt": [-1]}, "invalid_value"),
        ({"prompt": [5] * 4096}, "context_length_exceeded"),
        ({"prompt": ["x"] * 129}, "invalid_value"),
        ({"prompt": ["x"] * 2, "n": 100}, "invalid_value"),
        ({"suffix": "x"}, "unsupported_parameter"),
        ({"best_of": 5}, "unsupported_parameter"),
    ],
)
async def test_what_a_completion_is_refused_for(options: dict[str, Any], code: str) -> None:
    async with serving() as (suite, client):
        with pytest.raises(openai.BadRequestError) as caught:
            await client.post("/completions", body={"model": "fake", "prompt": "x"} | options, cast_to=object)
        assert caught.value.code == code
        assert suite.first.called("Session") == []


_SCHEMA = rb'"response_format": {"type": "json_schema", "json_schema": {"schema": {"const": %s}}}'


@pytest.mark.parametrize(
    ("member", "param"),
    [
        (rb'"prompt": "\ud800"', "prompt"),
        (rb'"prompt": "x", "\ud800": 1', r"\ud800"),
        (rb'"prompt": "x", "stream": true, "stream_options": {"\ud800": 1}', r"stream_options.\ud800"),
        (rb'"prompt": "x", ' + _SCHEMA % rb'"\ud800"', "response_format.json_schema.schema"),
        (rb'"prompt": "x", ' + _SCHEMA % rb"1e999", "response_format.json_schema.schema"),
    ],
)
async def test_what_only_json_can_spell_is_refused(member: bytes, param: str) -> None:
    async with serving() as (_, client):
        with pytest.raises(openai.BadRequestError) as caught:
            await client.post("/completions", content=b'{"model": "fake", %s}' % member, cast_to=object)
        assert caught.value.param == param


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"temperature": NaN}', b"[" * 100_000, b"\xff\xfe", b"1" * 5000])
async def test_bodies_that_are_no_request(body: bytes) -> None:
    async with serving() as (_, client):
        with pytest.raises(openai.BadRequestError) as caught:
            await client.post("/completions", content=body, cast_to=object)
        assert caught.value.code == "invalid_json"


async def test_a_body_that_is_too_large() -> None:
    async with serving(max_message_bytes=10_000) as (_, client):
        with pytest.raises(openai.APIStatusError) as caught:
            await client.completions.create(model="fake", prompt="x" * 10_000)
        assert (caught.value.status_code, caught.value.code) == (413, "request_too_large")

        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(11):
                yield b"x" * 1000

        with pytest.raises(openai.APIStatusError) as caught:
            await client.post("/completions", content=pieces(), cast_to=object)
        assert caught.value.status_code == 413
        await client.completions.create(model="fake", prompt="x")


async def test_bodies_under_way_are_as_many_as_requests_may_be() -> None:
    async with serving(max_requests=1) as (suite, client):
        host, port = suite.http.split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\nhalf")

        async def ask() -> None:
            async with asyncio.timeout(5):
                while True:  # until the other one has come
                    await client.completions.create(model="fake", prompt="x")

        with pytest.raises(openai.RateLimitError) as caught:
            await ask()
        assert caught.value.code == "overloaded"
        assert caught.value.response.headers["retry-after"] == "1"
        assert (await get(suite.http, "/health"))[0] == 200
        writer.close()


async def test_overload_says_when_to_come_back() -> None:
    async with serving(max_requests=1) as (suite, client):
        suite.first.gate.clear()
        first = asyncio.create_task(client.completions.create(model="fake", prompt="x"))
        await suite.first.until(lambda: suite.first.sequences)
        with pytest.raises(openai.RateLimitError) as caught:
            await client.completions.create(model="fake", prompt="x")
        assert caught.value.code == "overloaded"
        assert caught.value.response.headers["retry-after"] == "1"
        suite.first.gate.set()
        assert (await first).choices


async def test_no_engine_is_service_unavailable() -> None:
    async with serving() as (suite, client):
        await suite.first.stop()
        await suite.until(lambda: not suite.router.serving)
        with pytest.raises(openai.InternalServerError) as caught:
            await client.completions.create(model="fake", prompt="x")
        assert (caught.value.status_code, caught.value.code) == (503, "no_engine")
        assert int(caught.value.response.headers["retry-after"]) >= 1
        suite.engines.clear()


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
        stream = await client.completions.create(model="fake", prompt="x", max_tokens=3000, n=2, stream=True)
        await anext(aiter(stream))
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
            async with asyncio.timeout(10):
                while REQUESTS_IN_FLIGHT._value.get():
                    await client.models.list()
            assert b"[DONE]" not in await asyncio.to_thread(rest, reader)


def rest(reader: socket.socket) -> bytes:
    """Everything until the connection ends."""
    received = b""
    with suppress(ConnectionError):
        while data := reader.recv(1 << 20):
            received += data
    return received


@pytest.mark.slow
async def test_many_streams_at_once() -> None:
    async with serving(2) as (suite, client):

        async def tell(number: int) -> int:
            prompt = [10 + number % 200, 11, 12]
            stream = await client.completions.create(
                model="fake", prompt=prompt, max_tokens=20, temperature=0, stream=True
            )
            text = "".join([piece.choices[0].text async for piece in stream])
            expected = suite.first.model.generate(prompt, 20)
            assert text == byte_level().decode(expected)
            return len(text)

        assert min(await asyncio.gather(*map(tell, range(100)))) > 0


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


def test_the_synchronous_client() -> None:
    """In a thread, as the router's loop is this test's."""

    async def both() -> None:
        async with serving(fake_model=script(STORY)) as (suite, _):

            def ask() -> tuple[str | None, str]:
                with openai.OpenAI(base_url=f"http://{suite.http}/v1", api_key="any", max_retries=0) as client:
                    whole = client.chat.completions.create(model="fake", messages=USER)
                    stream = client.chat.completions.create(model="fake", messages=USER, stream=True)
                    return whole.choices[0].message.content, "".join(
                        piece.choices[0].delta.content or "" for piece in stream
                    )

            assert await asyncio.to_thread(ask) == (STORY, STORY)

    asyncio.run(both())


async def test_a_failing_choice_ends_all() -> None:
    async with serving(2) as (suite, client):
        for engine in suite.engines:
            engine.faults["StartGenerate"] = Fault(InvalidRequest("told to fail"), after_tokens=3)
        with pytest.raises(openai.APIStatusError):
            await client.completions.create(model="fake", prompt="x", n=3)
        await suite.idle()
