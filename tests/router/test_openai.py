"""The OpenAI-compatible door, used through the official client: what it answers."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest

from tests.router.harness import PROMPT, model, script
from tests.router.openai_client import USER, serving
from tests.router.vocabularies import byte_level

STORY = "the quick brown größe 🙂🙃 jumps over 你好 the lazy dog"


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


async def test_cached_tokens_are_those_of_all_prompts() -> None:
    async with serving(1) as (_, client):
        prompts: Any = [list(range(10, 19)), list(range(30, 35))]
        for num_cached in (0, 8 + 4):  # whole pages of each
            answer = await client.completions.create(model="fake", prompt=prompts, max_tokens=1, stream=False)
            assert answer.usage is not None
            assert answer.usage.prompt_tokens_details is not None
            assert answer.usage.prompt_tokens_details.cached_tokens == num_cached


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


async def test_special_tokens_take_no_room_in_the_text() -> None:
    said = byte_level().encode("one<|im_end|>two").ids
    async with serving(fake_model=model(script=tuple(said))) as (_, client):
        answer = await client.completions.create(model="fake", prompt="x", logprobs=1, max_tokens=99)
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert answer.choices[0].text == "onetwo"
        place = (logprobs.tokens or []).index("<|im_end|>")
        assert (logprobs.text_offset or [])[place : place + 2] == [3, 3]


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


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_keeps_its_name_to_the_letter(stream: bool) -> None:
    async with serving() as (suite, _):
        reader, writer = await asyncio.open_connection(*suite.http.split(":"))
        body = json.dumps({"prompt": "x", "stream": stream}).encode()
        name = "X-Request-Id: größe".encode("latin-1")
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n")
        writer.write(b"%b\r\nContent-Length: %d\r\n\r\n%b" % (name, len(body), body))
        head, _, _ = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        assert name.lower() in head.lower().split(b"\r\n")


async def test_models() -> None:
    async with serving() as (_, client):
        assert [each.id async for each in client.models.list()] == ["fake"]
        assert (await client.models.retrieve("fake")).object == "model"
        with pytest.raises(openai.NotFoundError) as caught:
            await client.models.retrieve("some/other")
        assert caught.value.code == "model_not_found"


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
