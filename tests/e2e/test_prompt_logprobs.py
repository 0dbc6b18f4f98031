"""A prompt's log-probabilities through every policy of a real suite, and as evaluation harnesses ask for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import openai
import pytest
import pytest_asyncio
from microserve.types.v1 import sampling_pb2 as sampling

from tests.e2e.prompts import mixed_prompts
from tests.e2e.suite import Suite, ask, generate, idle, start_suite, wait_for_load
from tests.models import make_tiny_llama

pytestmark = pytest.mark.slow

POLICIES = ("data_parallel", "disaggregated", "context_aware", "balanced:0.5", "adaptive")
PROMPTS = mixed_prompts(4, 500, 700)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def suite(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Suite]:
    # Small steps, so that every prompt of more than a few tokens is computed in pieces.
    model = make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")
    async with start_suite(model, engine_options=["--max-step-tokens", "64"]) as running:
        yield running


async def rated_by_forcing(suite: Suite, prompt: list[int]) -> list[float]:
    """Each token after the first as an answer to those before it."""
    if len(prompt) == 1:
        return []
    forced = await generate(suite, suite.engines[0], prompt[:1], forced=prompt[1:], salt="forced")
    return [each.chosen.logprob for each in forced.logprobs]


async def test_every_policy(suite: Suite) -> None:
    expected = [await rated_by_forcing(suite, prompt) for prompt in PROMPTS]
    plain = [(await generate(suite, suite.engines[0], prompt, salt="plain")).token_ids for prompt in PROMPTS]
    num_bytes = await suite.transferred_bytes()
    for policy in POLICIES:
        for _ in range(2):  # cold, then with everything cached
            answers = await asyncio.gather(
                *(ask(suite, prompt, policy, salt=policy, prompt_logprobs=3) for prompt in PROMPTS)
            )
            for prompt, answer, logprobs, tokens in zip(PROMPTS, answers, expected, plain, strict=True):
                assert list(answer.prompt_logprobs.logprobs) == pytest.approx(logprobs, abs=1e-4)
                assert len(answer.prompt_logprobs.top_token_ids) == 3 * (len(prompt) - 1)
                assert answer.token_ids == tokens
                start = answer.leg(sampling.VERB_START_GENERATE)
                assert start.timing.computed_token_count == len(prompt) or len(prompt) == 1
    assert await suite.transferred_bytes() == num_bytes, "nothing is sent in vain"
    for engine in suite.engines:
        await wait_for_load(engine, idle)


@pytest.mark.parametrize("stream", [False, True])
async def test_scoring_with_the_official_openai_client(suite: Suite, stream: bool) -> None:
    """As lm-eval does it: context and continuation as token ids, echoed; the last token of the answer is dropped."""
    assert suite.router_process is not None
    url = f"http://{suite.router_process.metrics}/v1"
    prompts = [prompt for prompt in PROMPTS if 1 < len(prompt) < 400]
    expected = [await rated_by_forcing(suite, prompt) for prompt in prompts]
    async with openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0) as client:
        for max_tokens in (0, 1):
            told: list[list[float | None]] = [[] for _ in prompts]
            answer = await client.completions.create(
                model="", prompt=prompts, echo=True, logprobs=1, max_tokens=max_tokens, temperature=0, stream=stream
            )
            for piece in [each async for each in answer] if isinstance(answer, openai.AsyncStream) else [answer]:
                for choice in piece.choices:
                    if choice.logprobs is not None:
                        told[choice.index] += choice.logprobs.token_logprobs or []
            for ours, logprobs in zip(told, expected, strict=True):
                assert ours[0] is None
                assert len(ours) == 1 + len(logprobs) + max_tokens
                assert ours[1 : 1 + len(logprobs)] == pytest.approx(logprobs, abs=1e-4)
