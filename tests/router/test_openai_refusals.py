"""The OpenAI-compatible door: what it refuses, and in which words."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import openai
import pytest
from microserve.router.v1 import admin_pb2

from services.router.openai.calls import Headers, chat
from services.router.openai.errors import Refusal
from services.router.openai.fields import Fields
from tests.fakes import FakeBug, Fault
from tests.router.openai_client import USER, serving
from tests.router.raw_http import fetch, get


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
        ({"messages": [{"role": "user"}]}, "messages[0].content", "invalid_value"),
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


async def test_a_guide_that_is_too_long_is_refused() -> None:
    async with serving() as (suite, client):
        for schema, is_taken in (({"enum": [1] * 16_000}, True), ({"enum": [1] * 17_000}, False)):
            wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
            body = {"model": "fake", "messages": USER, "response_format": wanted}
            if is_taken:
                await client.post("/chat/completions", body=body, cast_to=object)
                continue
            with pytest.raises(openai.BadRequestError) as caught:
                await client.post("/chat/completions", body=body, cast_to=object)
            assert caught.value.code == "invalid_request"
            assert "guide" in caught.value.message
        assert len(suite.first.called("Session")) == 1


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


async def test_where_json_is_wrong_is_told() -> None:
    async with serving() as (_, client):
        with pytest.raises(openai.BadRequestError, match=r"JSON: .+ at line 2, column 14"):
            await client.post("/completions", content=b'{"prompt": "x",\n "n": 1, "a" 2}', cast_to=object)


async def test_a_wrong_model_is_told_which_there_are() -> None:
    async with serving() as (suite, client):
        with pytest.raises(openai.NotFoundError, match=f"there is {suite.router.registry.models()[0].key.name}"):
            await client.completions.create(model="gpt-4", prompt="x")


async def test_a_base_url_without_the_version_is_told_the_paths() -> None:
    async with serving() as (suite, client):
        with pytest.raises(openai.NotFoundError, match="/v1/chat/completions"):
            await client.with_options(base_url=f"http://{suite.http}").completions.create(model="x", prompt="x")


@pytest.mark.parametrize("given", [{}, {"x-request-id": "mine"}])
async def test_what_fails_has_a_name_to_look_for_in_logs_and_traces(given: dict[str, str]) -> None:
    async with serving() as (suite, client):
        suite.first.faults["StartGenerate"] = Fault(FakeBug("no"))
        with pytest.raises(openai.InternalServerError) as caught:
            await client.completions.create(model="", prompt="x", extra_headers=given)
        request_id = caught.value.request_id
        assert request_id == given.get("x-request-id", request_id)
        assert request_id is not None
        explained = await suite.admin.ExplainRequest(admin_pb2.ExplainRequestRequest(request_id=request_id))
        assert explained.code == "INTERNAL"


async def test_a_body_that_is_too_large() -> None:
    limit = 2 << 20
    async with serving(max_message_bytes=limit) as (_, client):
        with pytest.raises(openai.APIStatusError) as caught:
            await client.completions.create(model="fake", prompt="x" * limit)
        assert (caught.value.status_code, caught.value.code) == (413, "request_too_large")

        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(11):
                yield b"x" * (limit // 10)

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
            async with asyncio.timeout(60):
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


async def test_a_path_tells_its_methods() -> None:
    async with serving() as (_, client):
        with pytest.raises(openai.APIStatusError, match="this path takes POST") as caught:
            await client.get("/completions", cast_to=object)
        assert (caught.value.status_code, caught.value.response.headers["allow"]) == (405, "POST")


def test_a_schema_of_any_depth_is_taken_or_refused() -> None:
    """Reading and writing JSON reach their limits of depth at different schemas."""
    limit = sys.getrecursionlimit()
    for depth in range(limit - 200, limit + 10):
        schema = '{"a":' * depth + "{}" + "}" * depth
        body = (
            f'{{"response_format": {{"type": "json_schema", "json_schema": {{"schema": {schema}}}}}, "messages": []}}'
        )
        with suppress(Refusal):
            chat(Fields.parse(body.encode()), Headers())


async def test_every_answer_of_the_paths_that_generate_has_the_name_of_its_request() -> None:
    limit = 2 << 20
    async with serving(api_key=("mine",), key="mine", max_message_bytes=limit, max_requests=1) as (suite, client):

        async def told(method: str = "POST", path: str = "completions", key: str = "mine", size: int = 2) -> int:
            """The status, and that the name is there: a new one, or the client's."""
            for given in ("", "x-request-id: named\r\n"):
                head = f"{method} /v1/{path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n{given}"
                head += f"Content-Length: {size}\r\nConnection: close\r\n\r\n"
                host, port = suite.http.split(":")
                reader, writer = await asyncio.open_connection(host, int(port))
                writer.write((head + "{}" * (size == 2)).encode())
                answer = (await reader.read()).decode()
                writer.close()
                names = [line for line in answer.split("\r\n") if line.startswith("x-request-id: ")]
                assert len(names) == 1, answer
                assert not given or [f"{name}\r\n" for name in names] == [given]
            return int(answer.split()[1])

        assert await told(key="other") == 401
        assert await told("PUT", "chat/completions") == 405
        assert await told(size=limit + 1) == 413
        assert await told() == 400
        suite.first.gate.clear()
        waiting = asyncio.create_task(client.completions.create(model="fake", prompt="x"))
        await suite.first.until(lambda: suite.first.sequences)
        assert await told() == 429
        draining = asyncio.create_task(suite.router._http_app.drain())
        await asyncio.sleep(0)
        assert await told() == 503
        suite.first.gate.set()
        await waiting
        await draining
