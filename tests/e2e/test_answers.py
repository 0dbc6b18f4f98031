"""What a request asks of its answers, by real processes: several to one prompt, and tokens made likelier or not."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from pathlib import Path

import pytest
from microserve.router.v1 import router_pb2 as router
from microserve.types.v1 import sampling_pb2 as sampling

from tests.e2e.prompts import mixed_prompts
from tests.e2e.suite import Suite, ask, idle, start_suite, wait_for_load
from tests.faults.gates import StepGate
from tests.models import make_tiny_llama

pytestmark = pytest.mark.slow

PROMPT = mixed_prompts(10, 500, 300)[-1]
PAGE_SIZE, NUM_ANSWERS, NUM_TOKENS = 16, 4, 100


async def answers_to(suite: Suite) -> dict[int, list[router.GenerateResponse]]:
    """The pieces of all answers, by choice."""
    request = router.GenerateRequest(tokens=router.TokenIds(ids=PROMPT), n=NUM_ANSWERS, cache_salt="shared")
    request.sampling.MergeFrom(sampling.SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, temperature=1.0, seed=7))
    assert suite.router is not None
    pieces = defaultdict(list)
    async for piece in suite.router.Generate(request, timeout=120):
        pieces[piece.choice].append(piece)
    return pieces


async def test_answers_to_one_prompt_share_its_pages(tmp_path: Path) -> None:
    steps = StepGate(tmp_path / "step")
    async with start_suite(
        make_tiny_llama(tmp_path / "m"), num_engines=1, policy="data_parallel", options_of={0: steps.options}
    ) as suite:
        (one,) = suite.engines
        with steps.closed() as gate:
            asking = asyncio.ensure_future(answers_to(suite))
            # Step by step, so that none ends before all have begun.
            load = await gate.until(wait_for_load(one, lambda now: now.running_sequence_count == NUM_ANSWERS))
        full, rest = divmod(len(PROMPT), PAGE_SIZE)
        assert full > 10
        # The full pages of the prompt once; the rest of it and all of the answer for each.
        assert full < load.pages.held <= full + NUM_ANSWERS * -(-(rest + NUM_TOKENS) // PAGE_SIZE) < 2 * full + 30
        answers = await asking
        assert sorted(answers) == list(range(NUM_ANSWERS))
        texts = {tuple(token for piece in pieces for token in piece.token_ids) for pieces in answers.values()}
        assert len(texts) == NUM_ANSWERS
        assert {len(text) for text in texts} == {NUM_TOKENS}
        for choice, pieces in answers.items():
            (leg,) = [leg for piece in pieces for leg in piece.legs]
            assert leg.timing.matched_token_count == (full * PAGE_SIZE if choice else 0)
            assert leg.timing.computed_token_count == (rest if choice else len(PROMPT))
        await wait_for_load(one, idle)


@pytest.mark.parametrize("policy", ["data_parallel", "disaggregated"])
async def test_biases_make_tokens_likelier_or_not(tiny_suite: Suite, policy: str) -> None:
    """And log-probabilities stay the model's own."""
    plain = await ask(tiny_suite, PROMPT, policy, salt=policy)
    best = plain.token_ids[0]
    without = await ask(tiny_suite, PROMPT, policy, salt=policy, logit_bias={best: -100})
    assert best not in without.token_ids
    assert without.token_ids[0] == plain.logprobs[0].top[1].token_id
    wanted = next(token for token in range(100, 500) if token not in plain.token_ids)
    only = await ask(tiny_suite, PROMPT, policy, salt=policy, logit_bias={wanted: 100})
    assert set(only.token_ids) == {wanted}
    for answer in (plain, without, only):
        assert answer.logprobs[0].top[0].token_id == best
        assert answer.logprobs[0].top[0].logprob == pytest.approx(plain.logprobs[0].top[0].logprob, abs=1e-4)
