"""RouterService: text in, text out, bounds, and what the last message says."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from microserve.router.v1 import admin_pb2, router_pb2
from microserve.types.v1 import sampling_pb2
from tokenizers import Tokenizer

from services.router.fleet.registry import Registry
from services.router.metrics import ENGINES, REQUESTS, TOKENS
from services.rpc.status import RemoteError, from_rpc_error
from tests.fakes import FakeEngine, FakeModel, Fault
from tests.router.harness import PROMPT, Running, failing, model, policy_metadata, request, running, script
from tests.router.vocabularies import byte_level, files

STOP, LENGTH = sampling_pb2.FINISH_REASON_STOP, sampling_pb2.FINISH_REASON_LENGTH
STORY = "the quick brown größe 🙂🙃 jumps over 你好 the lazy dog"


async def test_text_in_text_out_piece_by_piece() -> None:
    async with running(fake_model=script(STORY)) as suite:
        pieces = [piece async for piece in suite.stream(text="hello", max_tokens=0)]
        assert "".join(piece.text for piece in pieces) == STORY
        assert not any("\ufffd" in piece.text for piece in pieces)
        assert [piece.request_id != "" for piece in pieces] == [True] + [False] * (len(pieces) - 1)
        assert pieces[0].policy == "data_parallel"
        assert [piece.finish_reason for piece in pieces[:-1]] == [0] * (len(pieces) - 1)
        last = pieces[-1]
        assert last.finish_reason == STOP
        token_ids = [token for piece in pieces for token in piece.token_ids]
        assert token_ids == byte_level().encode(STORY).ids
        assert last.usage.output_token_count == len(token_ids)
        assert last.usage.prompt_token_count == len(byte_level().encode("hello").ids)


async def test_complete_says_the_same_as_generate() -> None:
    async with running(fake_model=script(STORY)) as suite:
        whole = await suite.generate(text="hello", max_tokens=0)
        assert (whole.text, whole.finish_reason, len(whole.legs)) == (STORY, STOP, 1)
        assert list(whole.token_ids) == byte_level().encode(STORY).ids
        assert whole.request_id


async def test_chat_goes_through_the_models_template() -> None:
    async with running(fake_model=script("hi")) as suite:
        await suite.generate(chat=[("user", "hello")])
        [start] = suite.first.called("Session")
        template = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
        assert list(start.prompt_token_ids) == byte_level().encode(template).ids


@pytest.mark.parametrize("include_stop", [False, True])
async def test_a_stop_string_ends_the_text_and_the_sequence(include_stop: bool) -> None:
    async with running(fake_model=script(STORY)) as suite:
        pieces = [p async for p in suite.stream(text="x", max_tokens=0, stop=["n grö"], include_stop=include_stop)]
        expected = "the quick brown grö" if include_stop else "the quick brow"
        assert "".join(piece.text for piece in pieces) == expected
        token_ids = [token for piece in pieces for token in piece.token_ids]
        assert byte_level().decode(token_ids).startswith("the quick brown grö")
        assert "n grö" not in byte_level().decode(token_ids[:-1])
        last = pieces[-1]
        assert (last.finish_reason, last.usage.output_token_count) == (STOP, len(token_ids))
        assert last.legs[0].timing.computed_token_count > 0  # the engine's account came although it was cut short
        await suite.idle()


async def test_a_stop_string_cancels_on_the_engine() -> None:
    async with running(1, fake_model=script(STORY)) as suite:
        suite.first.faults["StartGenerate"] = Fault(after_tokens=len("the quick"))  # it stands then, and does not end
        answer = await suite.generate(text="x", max_tokens=0, stop=["quick"])
        assert (answer.text, answer.finish_reason) == ("the ", STOP)
        assert suite.first.called("Cancel")


async def test_an_engine_that_gives_no_account_does_not_hold_up_a_stopped_answer() -> None:
    async with running(1, fake_model=script(STORY)) as suite:
        suite.first.faults["StartGenerate"] = Fault(after_tokens=8)
        answer = await suite.generate(text="x", max_tokens=0, stop=["quick"])
        assert answer.text == "the "


async def test_held_back_text_comes_out_at_the_end() -> None:
    async with running(fake_model=script("hello wor")) as suite:
        assert (await suite.generate(text="x", stop=["world"])).text == "hello wor"


async def test_seeds() -> None:
    async with running() as suite:
        given = [await suite.generate(seed=5, temperature=1.0) for _ in range(2)]
        assert list(given[0].token_ids) == list(given[1].token_ids) == model().generate(PROMPT, 8, seed=5)
        await suite.generate(temperature=1.0)
        await suite.generate(temperature=1.0)
        drawn = {start.sampling.seed for start in suite.first.called("Session")[2:]}
        assert len(drawn) == 2
        assert 5 not in drawn
        zero = await suite.generate(seed=0, temperature=1.0)
        assert list(zero.token_ids) == model().generate(PROMPT, 8, seed=0)


async def test_logprobs_come_one_for_each_token() -> None:
    async with running() as suite:
        answer = await suite.generate(logprobs=0)
        assert [each.chosen.token_id for each in answer.logprobs] == list(answer.token_ids)


async def test_sampling_reaches_the_engine_untouched() -> None:
    async with running(1) as suite:
        options: dict[str, Any] = {
            "temperature": 0.5,
            "top_p": 0.25,
            "top_k": 7,
            "min_p": 0.125,
            "repetition_penalty": 1.5,
            "presence_penalty": -1.0,
            "frequency_penalty": 1.0,
            "logit_bias": {5: 2.0},
            "seed": 2**63 + 1,
            "logprobs": 3,
            "prompt_logprobs": 2,
            "stop_token_ids": [4],
            "min_tokens": 1,
            "max_tokens": 2,
            "ignore_eos": True,
        }
        await suite.generate(**options)
        [start] = suite.first.called("Session")
        assert start.sampling == sampling_pb2.SamplingParams(**options)


@pytest.mark.parametrize(
    ("options", "code", "reason"),
    [
        ({"text": ""}, "INVALID_ARGUMENT", "EMPTY_PROMPT"),
        ({"prompt": ()}, "INVALID_ARGUMENT", "EMPTY_PROMPT"),
        ({"chat": []}, "INVALID_ARGUMENT", "EMPTY_PROMPT"),
        ({"chat": [("", "hello")]}, "INVALID_ARGUMENT", "INVALID_REQUEST"),
        ({"chat": [("u" * 200, "hello")]}, "INVALID_ARGUMENT", "INVALID_REQUEST"),
        ({"prompt": (5, 100_000)}, "INVALID_ARGUMENT", "INVALID_REQUEST"),
        ({"prompt": (5,) * 4096}, "INVALID_ARGUMENT", "PROMPT_TOO_LONG"),
        ({"stop": [""]}, "INVALID_ARGUMENT", "INVALID_REQUEST"),
        ({"stop": ["x" * 257]}, "INVALID_ARGUMENT", "INVALID_REQUEST"),
        ({"stop": ["x"] * 17}, "INVALID_ARGUMENT", "INVALID_REQUEST"),
        ({"cache_salt": "x" * 129}, "INVALID_ARGUMENT", "INVALID_REQUEST"),
        ({"cache_salt": "x\nlevel=error"}, "INVALID_ARGUMENT", "INVALID_REQUEST"),
        ({"request_id": "x" * 129}, "INVALID_ARGUMENT", "INVALID_REQUEST"),
        ({"request_id": "two\nlines"}, "INVALID_ARGUMENT", "INVALID_REQUEST"),
        ({"logprobs": 21}, "INVALID_ARGUMENT", "INVALID_REQUEST"),
        ({"prompt_logprobs": 21}, "INVALID_ARGUMENT", "INVALID_REQUEST"),
        ({"stop_token_ids": range(2000)}, "INVALID_ARGUMENT", "INVALID_REQUEST"),
        ({"logit_bias": dict.fromkeys(range(5000), 1.0)}, "INVALID_ARGUMENT", "INVALID_REQUEST"),
        ({"policy": "nope"}, "NOT_FOUND", "UNKNOWN_POLICY"),
        ({"policy": "balanced:2"}, "INVALID_ARGUMENT", "BAD_POLICY"),
        ({"policy": "balanced:ratio=x"}, "INVALID_ARGUMENT", "BAD_POLICY"),
        ({"policy": "data_parallel:1"}, "INVALID_ARGUMENT", "BAD_POLICY"),
        ({"policy": f"balanced:{' ' * 5000}0.1"}, "INVALID_ARGUMENT", "INVALID_REQUEST"),  # it stands in traces
        ({"model": "nope"}, "NOT_FOUND", "UNKNOWN_MODEL"),
    ],
)
async def test_what_is_refused(options: dict[str, Any], code: str, reason: str) -> None:
    async with running(1) as suite:
        with failing(code, reason):
            await suite.generate(**options)
        assert suite.first.called("Session") == []
        await suite.generate()


async def test_a_request_without_prompt_is_refused() -> None:
    async with running(1) as suite:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await suite.stub.Complete(router_pb2.CompleteRequest())
        assert from_rpc_error(caught.value).reason == "EMPTY_PROMPT"


async def test_too_many_requests_are_refused_at_once() -> None:
    async with running(1, max_requests=1) as suite:
        suite.first.gate.clear()
        first = suite.stream()
        await suite.first.until(lambda: suite.first.sequences)
        with failing("RESOURCE_EXHAUSTED", "OVERLOADED") as caught:
            await suite.generate()
        assert caught.value.retry_delay_s == 1.0
        suite.first.gate.set()
        assert len([piece async for piece in first]) > 0
        await suite.generate()


@pytest.mark.slow
async def test_a_client_that_reads_slowly_does_not_stall_the_others() -> None:
    async with running(1) as suite:
        slow = aiter(suite.stream(max_tokens=3000))
        pieces = [await anext(slow)]
        for _ in range(5):
            await suite.generate()
        pieces += [piece async for piece in slow]
        assert [token for piece in pieces for token in piece.token_ids] == model().generate(PROMPT, 3000)


@pytest.mark.slow
async def test_a_client_that_never_reads_is_cut_off() -> None:
    """Its engine stops when the router keeps enough for it, and its place is free after the client's timeout."""
    wordy = Tokenizer.from_str(byte_level().to_str())
    wordy.add_tokens(["x" * 2000])  # so that the connection is soon full
    endless = FakeModel(files(wordy), script=(wordy.token_to_id("x" * 2000),) * 90_000, max_context=100_000)
    limits = {"max_buffered_tokens": 5000, "client_timeout": 0.1, "max_requests": 1}
    async with running(1, fake_model=endless, **limits) as suite:
        call = suite.stream(max_tokens=0)
        await suite.first.until(lambda: suite.first.sequences)
        await suite.idle()
        assert suite.first.called("Cancel")
        async with asyncio.timeout(60):
            while await refused(suite):
                pass
        call.cancel()


async def refused(suite: Running) -> bool:
    try:
        await suite.generate(max_tokens=1)
    except RemoteError as error:
        return error.reason == "OVERLOADED"
    return False


async def test_tokenize_and_detokenize() -> None:
    async with running(1) as suite:
        text = await suite.stub.Tokenize(router_pb2.TokenizeRequest(text=STORY))
        assert list(text.token_ids) == byte_level().encode(STORY).ids
        back = await suite.stub.Detokenize(router_pb2.DetokenizeRequest(token_ids=text.token_ids))
        assert back.text == STORY
        broken = await suite.stub.Detokenize(router_pb2.DetokenizeRequest(token_ids=byte_level().encode("🙂").ids[:-1]))
        assert broken.text == "\ufffd"
        messages = router_pb2.ChatMessages(messages=[router_pb2.ChatMessage(role="user", content="hello")])
        chat = await suite.stub.Tokenize(router_pb2.TokenizeRequest(chat=messages))
        assert chat.token_ids[0] == 1
        with pytest.raises(grpc.aio.AioRpcError, match="not below"):
            await suite.stub.Detokenize(router_pb2.DetokenizeRequest(token_ids=[10**6]))
        with pytest.raises(grpc.aio.AioRpcError, match="more than"):  # the event loop would stand still
            await suite.stub.Detokenize(router_pb2.DetokenizeRequest(token_ids=[1] * 200_000))


async def test_tokenizing_counts_as_a_request() -> None:
    async with running(1, max_requests=1) as suite:
        suite.first.gate.clear()
        call = suite.stream()
        await suite.first.until(lambda: suite.first.sequences)
        with pytest.raises(grpc.aio.AioRpcError, match="as many as this router takes"):
            await suite.stub.Tokenize(router_pb2.TokenizeRequest(text=STORY))
        suite.first.gate.set()
        assert [piece async for piece in call]
        await suite.stub.Tokenize(router_pb2.TokenizeRequest(text=STORY))


def test_a_router_that_never_had_an_engine_tells_that_it_has_none() -> None:
    ENGINES.clear()
    Registry()
    [shown] = ENGINES.collect()
    assert {each.labels["state"]: each.value for each in shown.samples} == dict.fromkeys(
        ("healthy", "passed_over", "unhealthy"), 0.0
    )


async def test_models_are_kept_apart_by_name_and_weights() -> None:
    peers: dict[str, FakeEngine] = {}
    big, odd = model(name="big", vocab_size=200, max_context=100), model(version="2")
    engines = [FakeEngine(each, name, peers=peers) for each, name in ((model(), "a"), (big, "b"), (odd, "c"))]
    engines.append(FakeEngine(model(), "d", peers=peers))
    async with running(engines=engines) as suite:
        models = (await suite.stub.ListModels(router_pb2.ListModelsRequest())).models
        assert [(each.name, each.engine_count) for each in models] == [("big", 1), ("fake", 2)]
        assert models[1].digest == model().digest
        listed = {
            each.info.engine_name: each
            for each in (await suite.admin.ListEngines(admin_pb2.ListEnginesRequest())).engines
        }
        assert [name for name, each in listed.items() if not each.healthy] == ["c"]
        assert "other weights" in listed["c"].problem
        assert [ENGINES.labels(state)._value.get() for state in ("healthy", "passed_over")] == [3, 1]
        with failing("INVALID_ARGUMENT", "MODEL_REQUIRED"):
            await suite.generate()
        answer = await suite.generate(model="big")
        assert (answer.legs[0].engine, list(answer.token_ids)) == ("b", big.generate(PROMPT, 8))
        answers = await asyncio.gather(*(suite.generate(model="fake", policy="disaggregated") for _ in range(4)))
        assert {leg.engine for answer in answers for leg in answer.legs} == {"a", "d"}


async def test_metrics_count_requests_and_tokens() -> None:
    ended, prompt = REQUESTS.labels("fake", "balanced", "OK"), TOKENS.labels("prompt")
    before = ended._value.get(), prompt._value.get()
    async with running() as suite:
        call = suite.stub.Generate(request(), metadata=policy_metadata("balanced:0.25"))
        assert [piece async for piece in call]
    assert (ended._value.get(), prompt._value.get()) == (before[0] + 1, before[1] + len(PROMPT))
