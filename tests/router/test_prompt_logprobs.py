"""Log-probabilities of prompts through the router: each once, whatever the policy, and whatever fails."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from microserve.router.v1 import router_pb2
from microserve.types.v1 import sampling_pb2

from services.router.front import wire
from tests.fakes import TOLD_AT_ONCE, FakeLoss, Fault
from tests.router.harness import PROMPT, model, request, running, script, verbs
from tests.router.openai_client import serving
from tests.router.test_policies import POLICIES
from tests.router.vocabularies import SPECIAL, byte_level, files, sentencepiece

LENGTH = sampling_pb2.FINISH_REASON_LENGTH


def assert_told(told: sampling_pb2.PromptLogprobs, prompt: tuple[int, ...], num_top: int) -> None:
    assert list(told.logprobs) == model().rate_prompt(prompt)
    assert told.top_count == num_top
    assert list(told.top_token_ids) == [token + rank for token in prompt[1:] for rank in range(num_top)]


@pytest.mark.parametrize("policy", POLICIES)
async def test_every_policy_tells_the_prompt_and_has_nothing_sent_in_vain(policy: str) -> None:
    async with running(policy=policy) as suite:
        for _ in range(2):  # cold, then with a warm cache
            answer = await suite.generate(prompt_logprobs=2)
            assert_told(answer.prompt_logprobs, PROMPT, 2)
            assert list(answer.token_ids) == model().generate(PROMPT, 8)
            assert answer.usage.cached_token_count == 0
        assert not [verb for verb, *_ in verbs(answer) if verb == "remote_send"]
        assert sum(len(engine.called("RemoteSend")) for engine in suite.engines) == 0
        after = await suite.generate((*PROMPT, 5, 6))
        assert list(after.token_ids) == model().generate((*PROMPT, 5, 6), 8)
        assert not after.HasField("prompt_logprobs")


async def test_what_a_program_sends_by_hand_ends_before_what_is_told(tmp_path: Any) -> None:
    source = """
from services.router.policies import TokenRange

async def policy(request, fleet):
    one, two = fleet.pair(request)
    end = len(request.prompt) - 1
    async with two.prep_recv(request, end=end) as kv:
        await one.remote_send(request, kv, TokenRange(0, 20))
        await one.remote_send(request, kv, TokenRange(20, end))
        async for chunk in two.start_generate(request, begin=end, kv=kv):
            yield chunk
"""
    path = tmp_path / "by_hand.py"
    path.write_text(source)
    async with running(policy=str(path)) as suite:
        answer = await suite.generate(prompt_logprobs=0)
        assert_told(answer.prompt_logprobs, PROMPT, 0)
        assert verbs(answer) == [("prep_recv", "b", 0, 0), ("start_generate", "b", 0, len(PROMPT))]
        plain = await suite.generate(cache_salt="another")
        assert [verb for verb, *_ in verbs(plain)] == ["prep_recv", "remote_send", "remote_send", "start_generate"]


@pytest.mark.parametrize("num_told", [1, 10, 25, 50])
@pytest.mark.parametrize("policy", ["data_parallel", "disaggregated"])
async def test_one_that_fails_in_between_is_continued_with_what_is_not_told_yet(num_told: int, policy: str) -> None:
    async with running(3, policy=policy) as suite:
        broken = suite.engines[0 if policy == "data_parallel" else 1]
        broken.faults["StartGenerate"] = Fault(FakeLoss("lost"), after_told=num_told)
        answer = await suite.generate(prompt_logprobs=1)
        assert_told(answer.prompt_logprobs, PROMPT, 1)
        assert list(answer.token_ids) == model().generate(PROMPT, 8)
        starts = [each for engine in suite.engines if engine is not broken for each in engine.called("StartGenerate")]
        assert [start.prompt_logprobs_begin for start in starts] == [-(-num_told // TOLD_AT_ONCE) * TOLD_AT_ONCE + 1]


async def test_after_the_first_token_nothing_is_told_again() -> None:
    async with running(2) as suite:
        suite.first.faults["StartGenerate"] = Fault(FakeLoss("lost"), after_tokens=3)
        answer = await suite.generate(prompt_logprobs=1)
        assert_told(answer.prompt_logprobs, PROMPT, 1)
        assert list(answer.token_ids) == model().generate(PROMPT, 8)
        [second] = suite.engines[1].called("StartGenerate")
        assert second.prompt_logprobs_begin == second.prompt_token_count == len(PROMPT)


async def test_many_choices_are_told_of_their_prompt_once() -> None:
    async with running(2, policy="disaggregated") as suite:
        message = request(prompt_logprobs=1, n=3)
        reply = await suite.stub.Complete(router_pb2.CompleteRequest(request=message))
        assert_told(reply.response.prompt_logprobs, PROMPT, 1)
        assert not any(other.HasField("prompt_logprobs") for other in reply.other_choices)
        starts = [start for engine in suite.engines for start in engine.called("Session")]
        assert [start.sampling.HasField("prompt_logprobs") for start in starts] == [True, False, False]


async def test_a_prompt_alone() -> None:
    async with running(fake_model=script("hello")) as suite:
        answer = await suite.generate(prompt_logprobs=0, prompt_only=True, echo=True, min_tokens=3, max_tokens=5)
        assert list(answer.prompt_logprobs.logprobs) == model().rate_prompt(PROMPT)
        assert (answer.text, list(answer.token_ids), answer.finish_reason) == ("", [], LENGTH)
        assert (answer.usage.prompt_token_count, answer.usage.output_token_count) == (len(PROMPT), 0)
        assert list(answer.prompt.token_ids) == list(PROMPT)
        [start] = suite.first.called("StartGenerate")
        assert (start.sampling.max_tokens, start.sampling.min_tokens) == (1, 0)


async def test_one_token_has_nothing_to_tell() -> None:
    async with running() as suite:
        answer = await suite.generate(PROMPT[:1], prompt_logprobs=3)
        assert not answer.HasField("prompt_logprobs")
        assert len(answer.token_ids) == 8


async def test_what_one_message_cannot_hold_comes_in_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_PROMPT_NUMBERS", 100)  # 20 tokens of five numbers
    async with running() as suite:
        messages = [each async for each in suite.stream(prompt_logprobs=2, echo=True, max_tokens=1, logprobs=0)]
        told = [len(message.prompt_logprobs.logprobs) for message in messages if message.HasField("prompt_logprobs")]
        assert told == [20, 20, 10]
        assert [bool(message.request_id) for message in messages] == [True, *[False] * (len(messages) - 1)]
        assert [message.HasField("prompt") for message in messages[:2]] == [True, False]
        whole = sampling_pb2.PromptLogprobs()
        for message in messages:
            assert not message.token_ids or len(whole.logprobs) + len(message.prompt_logprobs.logprobs) == 50
            whole.MergeFrom(message.prompt_logprobs)
        assert_told(whole, PROMPT, 2)


# --- OpenAI -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 1, 3])
@pytest.mark.parametrize("n", [1, 2])
async def test_an_echo_with_logprobs_as_evaluations_ask_for_it(stream: bool, max_tokens: int, n: int) -> None:
    text = "größe 🙂 hello"
    ids = tuple(byte_level().encode(text).ids)
    async with serving(fake_model=script(" world")) as (_, client):
        answer = await client.completions.create(
            model="fake", prompt=text, echo=True, logprobs=1, max_tokens=max_tokens, n=n, temperature=0, stream=stream
        )
        pieces = [each async for each in answer] if isinstance(answer, openai.AsyncStream) else [answer]
        for index in range(n):
            told: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
            whole, finish = "", None
            for choice in (choice for piece in pieces for choice in piece.choices if choice.index == index):
                whole, finish = whole + choice.text, choice.finish_reason or finish
                if choice.logprobs is not None:
                    for name, values in told.items():
                        values += getattr(choice.logprobs, name)
            output = byte_level().encode(" world").ids[:max_tokens]
            assert whole == text + byte_level().decode(output)
            assert finish == ("stop" if len(output) < max_tokens else "length")
            assert told["token_logprobs"] == [None, *model().rate_prompt(ids), *[-0.5] * len(output)]
            assert {len(values) for values in told.values()} == {len(ids) + len(output)}
            assert told["top_logprobs"][0] is None
            # How lm-eval finds out whether a token is the one that would have been chosen.
            rated = zip(told["token_logprobs"][1 : len(ids)], told["top_logprobs"][1 : len(ids)], strict=True)
            assert all(logprob == max(tops.values()) for logprob, tops in rated)
            for token, begin, end in zip(told["tokens"], told["text_offset"], told["text_offset"][1:], strict=False):
                assert token.startswith("bytes:") or token == whole[begin:end]


async def test_offsets_in_an_echo_leave_out_what_it_leaves_out() -> None:
    """A first token of the model's own, and the space that the tokenizer puts before a text."""
    spoken = model().__class__(files(sentencepiece()), vocab_size=sentencepiece().get_vocab_size())
    async with serving(fake_model=spoken) as (_, client):
        answer = await client.completions.create(
            model="fake", prompt="hello world", echo=True, logprobs=0, max_tokens=0, temperature=0
        )
        [choice] = answer.choices
        assert choice.text == "hello world"
        assert choice.logprobs is not None
        assert choice.logprobs.tokens == ["<s>", " h", "e", "ll", "o", " w", "or", "ld"]
        assert choice.logprobs.text_offset == [0, 0, 1, 2, 4, 5, 7, 9]
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (8, 0)


async def test_prompts_of_one_call_are_told_apart() -> None:
    prompts = [list(PROMPT[:5]), list(PROMPT[10:30])]
    async with serving() as (_, client):
        answer = await client.completions.create(model="fake", prompt=prompts, echo=True, logprobs=0, max_tokens=0)
        for choice, prompt in zip(answer.choices, prompts, strict=True):
            assert choice.logprobs is not None
            assert choice.logprobs.token_logprobs == [None, *model().rate_prompt(prompt)]
            assert choice.logprobs.top_logprobs == [None, *[{}] * (len(prompt) - 1)]


async def test_prompt_logprobs_as_vllm_has_them() -> None:
    async with serving() as (_, client):
        extra = {"prompt_logprobs": 2}
        completion = await client.completions.create(model="fake", prompt=list(PROMPT[:4]), extra_body=extra)
        shown = completion.choices[0].prompt_logprobs  # type: ignore[attr-defined]
        assert completion.choices[0].logprobs is None
        assert shown[0] is None
        rated = model().rate_prompt(PROMPT[:4])
        assert [entries[str(token)]["logprob"] for entries, token in zip(shown[1:], PROMPT[1:4], strict=True)] == rated
        assert [len(entries) for entries in shown[1:]] == [2, 2, 2]
        assert [entries[str(token)]["rank"] for entries, token in zip(shown[1:], PROMPT[1:4], strict=True)] == [1] * 3
        chat = await client.chat.completions.create(
            model="fake", messages=[{"role": "user", "content": "hi"}], extra_body={"prompt_logprobs": 0}, max_tokens=1
        )
        assert chat.usage is not None
        assert len(chat.prompt_logprobs) == chat.usage.prompt_tokens  # type: ignore[attr-defined]
        name = next(iter(chat.prompt_logprobs[2].values()))["decoded_token"]  # type: ignore[attr-defined]
        assert name not in SPECIAL


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0, "logprobs": 1}, "max_completion_tokens"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ],
)
async def test_what_is_refused(options: dict[str, Any], param: str) -> None:
    async with serving() as (_, client):
        with pytest.raises(openai.BadRequestError) as caught:
            await client.post("/completions", body={"model": "fake", "prompt": "x"} | options, cast_to=object)
        assert (caught.value.param, caught.value.code) == (param, "invalid_value")
