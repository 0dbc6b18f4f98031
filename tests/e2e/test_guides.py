"""Output of the real model under a JSON Schema parses and fits, whichever way it is served; bad guides harm nobody."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import grpc
import grpc.aio
import pytest
from microserve.router.v1 import router_pb2 as router
from microserve.types.v1 import sampling_pb2 as sampling
from tokenizers import Tokenizer

from services.engine.model.fetch import fetch_model
from services.engine.model.gguf.convert import converted_folder
from tests.e2e.suite import Suite, arrived, ask, generate, idle, start_suite, wait_for_load
from tests.faults.gates import StepGate

pytestmark = pytest.mark.slow

QUESTION = "<|im_start|>user\nDescribe a {} as JSON with name, weight and colours.<|im_end|>\n<|im_start|>assistant\n"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "weight": {"type": "integer", "minimum": 1, "maximum": 9999},
        "colours": {"type": "array", "items": {"enum": ["black", "white", "brown"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "weight", "colours"],
    "additionalProperties": False,
}
GUIDE = sampling.Guide(json_schema=json.dumps(SCHEMA))
MAX_TOKENS = 150


@pytest.fixture(scope="module")
def model() -> Path:
    return converted_folder(fetch_model("smollm2-135m", show_progress=False))


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer.from_file(str(model / "tokenizer.json"))


@pytest.fixture(scope="module")
def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    return [tokenizer.encode(QUESTION.format(animal)).ids for animal in ("dog", "horse", "cat", "bear")]


def assert_fits(text: str) -> None:
    value = json.loads(text)
    assert set(value) == {"name", "weight", "colours"}
    assert len(value["name"]) <= 30
    assert 1 <= value["weight"] <= 9999
    assert 1 <= len(value["colours"]) <= 3
    assert set(value["colours"]) <= {"black", "white", "brown"}


async def test_every_way_of_serving(real_suite: Suite, prompts: list[list[int]]) -> None:
    for policy in ("data_parallel", "disaggregated"):
        answers = await asyncio.gather(
            *(
                ask(
                    real_suite, prompt, policy, max_tokens=MAX_TOKENS, salt=policy, guide=GUIDE, temperature=0.8, seed=n
                )
                for n, prompt in enumerate(prompts, start=1)
            )
        )
        for answer in answers:
            assert answer.finish_reason == sampling.FINISH_REASON_STOP
            assert_fits(answer.text)
    assert real_suite.router is not None
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await ask(real_suite, prompts[0], "disaggregated", guide=sampling.Guide(json_schema='{"type": 1}'))
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    choice = sampling.Guide(choice=sampling.Choice(texts=["Paris", "Berlin"]))
    request = router.GenerateRequest(
        text="The capital of France is", sampling=sampling.SamplingParams(guide=choice, max_tokens=10)
    )
    reply = await real_suite.router.Complete(router.CompleteRequest(request=request), timeout=60)
    assert reply.response.text == "Paris"
    for each in real_suite.engines:
        await wait_for_load(each, idle)


async def test_under_preemption(model: Path, tokenizer: Tokenizer, prompts: list[list[int]], tmp_path: Path) -> None:
    page_count = sum(len(prompt) // 16 + 1 for prompt in prompts) + 4
    steps = StepGate(tmp_path / "step")
    async with start_suite(
        model, num_engines=1, policy=None, page_count=page_count, engine_options=steps.options
    ) as small:
        one = small.engines[0]
        with steps.closed() as gate:
            asked = asyncio.gather(
                *(
                    generate(
                        small, one, prompt, max_tokens=MAX_TOKENS, salt=str(n), guide=GUIDE, temperature=0.8, seed=n
                    )
                    for n, prompt in enumerate(prompts, start=1)
                )
            )
            await gate.reached()
            await arrived(one)  # and they begin together
        results = await asked
        assert sum(result.timing.preemption_count for result in results) > 0
        for result in results:
            assert result.finish_reason == sampling.FINISH_REASON_STOP
            assert_fits(tokenizer.decode(result.token_ids))
        await wait_for_load(one, idle)
