"""Choices that stay on the device are those of the plain sampler, row by row."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from services.engine.core.plan import Chosen, SampleSpec
from services.engine.gpu.choosing import Choices, Chooser
from services.engine.gpu.packing import Packer
from services.engine.sampling.params import SamplingParams
from services.engine.sampling.sampler import SamplingRow, sample

VOCAB = 600
EOS = (7,)
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
    ),
]


def random_spec(source: random.Random, num_awaited: int) -> tuple[SampleSpec, int]:
    """One request, whatever may be asked for, and the newest token of its sequence."""
    tokens = [source.randrange(VOCAB) for _ in range(source.randint(2, 30))]
    params = SamplingParams(
        temperature=source.choice([0.0, 0.3, 1.0, 2.0]),
        top_p=source.choice([1.0, 0.9, 0.5]),
        top_k=source.choice([0, 0, 1, 40]),
        min_p=source.choice([0.0, 0.0, 0.05]),
        repetition_penalty=source.choice([1.0, 1.3]),
        presence_penalty=source.choice([0.0, 1.5]),
        frequency_penalty=source.choice([0.0, 0.5]),
        logit_bias=SamplingParams.bias_pairs({source.randrange(VOCAB): 3.0, 5: -2.0}) if source.random() < 0.3 else (),
        seed=source.randrange(2**64),
        logprobs=source.choice([None, None, 0, 3]),
        min_tokens=source.choice([0, 50]),
    )
    forced = source.randrange(VOCAB) if source.random() < 0.1 else None
    allowed = None
    if source.random() < 0.3:
        bits = np.array([source.random() < 0.05 for _ in range(VOCAB)])
        bits[11] = True
        allowed = np.packbits(bits, bitorder="little")
    known = tokens[: len(tokens) - num_awaited]
    return SampleSpec(params, known, source.randint(1, len(known)), forced, allowed, num_awaited), tokens[-1]


def plain(logits: torch.Tensor, specs: Sequence[SampleSpec], newest: Sequence[int]) -> list[Chosen]:
    rows = [
        SamplingRow(
            spec.params, [*spec.token_ids, *[last] * spec.num_awaited], spec.num_prompt_tokens,
            spec.forced_token_id, spec.allowed,
        )
        for spec, last in zip(specs, newest, strict=True)
    ]  # fmt: skip
    return [Chosen(each.token_id, each.logprob, each.top) for each in sample(logits, rows, EOS)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(12))
def test_the_same_tokens_as_the_plain_sampler(seed: int, device: str) -> None:
    source = random.Random(seed)
    made = [random_spec(source, source.choice([0, 1])) for _ in range(source.choice([1, 3, 17]))]
    specs, newest = [spec for spec, _ in made], [last for _, last in made]
    logits = torch.randn(len(specs), VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    before = logits.clone()
    packer = Packer()
    chooser = Chooser(packer, specs, EOS)
    packed = packer.send(torch.device(device))
    choices = chooser.choose(packed, logits.to(device), torch.tensor(newest, device=device))
    actual = chooser.result(Choices(choices.tokens.cpu(), choices.logprobs.cpu(), choices.top_ids.cpu()))
    expected = plain(logits, specs, newest)
    assert [each.token_id for each in actual] == [each.token_id for each in expected]
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.logprob == (None if theirs.logprob is None else pytest.approx(theirs.logprob, abs=1e-5))
        assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]
    assert torch.equal(logits, before), "the model's own logits are not changed"


def test_greedy_rows_send_next_to_nothing() -> None:
    packer = Packer()
    specs = [SampleSpec(SamplingParams(), [1, 2, 3], 2)] * 4
    chooser = Chooser(packer, specs, EOS)
    logits = torch.randn(4, VOCAB)
    choices = chooser.choose(packer.send(torch.device("cpu")), logits, torch.zeros(4, dtype=torch.int64))
    assert choices.tokens.tolist() == logits.argmax(-1).tolist()
    assert choices.logprobs.numel() == 0
