"""Families with sliding windows, and a model that transformers computes, served by real processes: moved KV or not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from microserve.types.v1 import sampling_pb2 as sampling

from tests.e2e.suite import ask, idle, start_suite, wait_for_load
from tests.engine.model.random_models import VARIANTS, save_random
from tests.engine.model.running import random_tokens
from tests.models import make_tiny_llama

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

MODELS = {**VARIANTS, "olmo2": ("Olmo2Config", {})}
LENGTHS = (5, 39, 41, 90, 200)  # some beyond the window


@pytest.mark.parametrize("name", ["gemma3", "gemma2", "qwen3, window and biases", "olmo2"])
async def test_disaggregated_equals_one_engine(tmp_path: Path, name: str) -> None:
    config_class, changes = MODELS[name]
    save_random(tmp_path / "model", config_class, {**changes, "vocab_size": 512})
    shutil.copy(make_tiny_llama(tmp_path / "tiny") / "tokenizer.json", tmp_path / "model")
    prompts = [random_tokens(length, 512, seed=length) for length in LENGTHS]
    # A pool smaller than the model's context, however its size was said, leaves room for reservations all the same.
    page_count = 28 if name == "olmo2" else None
    options = ["--dtype", "float32"]
    async with start_suite(tmp_path / "model", engine_options=options, kv_memory_mib=2, page_count=page_count) as suite:
        said = {}
        for policy in ("data_parallel", "disaggregated"):
            # One after the other: all at once they would find the pool full, and be served without a reservation.
            answers = [await ask(suite, prompt, policy, max_tokens=8, salt=policy) for prompt in prompts]
            said[policy] = [answer.token_ids for answer in answers]
        sends = [leg for answer in answers for leg in answer.legs if leg.verb == sampling.VERB_REMOTE_SEND]
        assert len(sends) == len(prompts)
        assert said["data_parallel"] == said["disaggregated"]
        for each in suite.engines:
            await wait_for_load(each, idle)
