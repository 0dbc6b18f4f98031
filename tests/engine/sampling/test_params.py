"""Which sampling values are refused, and with which words."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest

from services.engine.sampling.params import MAX_LOGIT_BIASES, InvalidSampling, SamplingParams

VOCAB_SIZE = 100
NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("temperature", value) for value in (-0.1, 100.1, NAN, INFINITY, "warm", True)),
        *(("top_p", value) for value in (0.0, -1.0, 1.01, NAN)),
        *(("top_k", value) for value in (-1, 1.5, 2**40)),
        *(("min_p", value) for value in (-0.1, 1.1, NAN)),
        *(("repetition_penalty", value) for value in (0.0, -1.0, 0.009, 1e-38, 101.0, NAN)),
        *(("presence_penalty", value) for value in (-2.1, 2.1, NAN)),
        *(("frequency_penalty", value) for value in (-2.1, 2.1, NAN)),
        *(("logit_bias", value) for value in (((100, 1.0),), ((-1, 1.0),), ((5, 101.0),), ((5, NAN),))),
        ("logit_bias", ((5, 1.0), (5, 2.0))),
        ("logit_bias", ((5, 1.0),) * (MAX_LOGIT_BIASES + 1)),
        *(("seed", value) for value in (-1, 2**64)),
        *(("logprobs", value) for value in (-1, 21)),
        *(("stop_token_ids", value) for value in ((100,), (-1,), tuple(range(100)) * 11)),
        *(("min_tokens", value) for value in (-1, 2**31)),
        *(("max_tokens", value) for value in (0, -1, 2**31)),
    ],
)
def test_absurd_values(field: str, value: Any) -> None:
    with pytest.raises(InvalidSampling) as raised:
        SamplingParams(**{field: value}).validate(VOCAB_SIZE)
    assert raised.value.field == field
    assert raised.value.sentence.endswith(".")


def test_min_above_max_tokens() -> None:
    with pytest.raises(InvalidSampling, match="min_tokens must not exceed max_tokens, 3"):
        SamplingParams(min_tokens=4, max_tokens=3).validate(VOCAB_SIZE)


def test_sensible_values() -> None:
    SamplingParams().validate(VOCAB_SIZE)
    SamplingParams(
        temperature=100,
        top_p=1e-9,
        top_k=10**6,
        min_p=1,
        repetition_penalty=0.5,
        presence_penalty=-2,
        frequency_penalty=2,
        logit_bias=SamplingParams.bias_pairs({99: -100.0, 0: 100.0}),
        seed=2**64 - 1,
        logprobs=20,
        stop_token_ids=(0, 99),
        min_tokens=7,
        max_tokens=7,
    ).validate(VOCAB_SIZE)


def test_no_torch_needed() -> None:
    code = "import sys, services.engine.sampling.params; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().seed = 1  # type: ignore[misc]
