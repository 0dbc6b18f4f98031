"""Each sampling value does what it says, and a row's token is its own affair."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from services.engine.sampling.params import SamplingParams
from services.engine.sampling.philox import uniforms
from services.engine.sampling.sampler import SampledToken, SamplingRow, sample

VOCAB_SIZE = 6000  # above the largest first look at candidates


def _logits(rows: int = 1, spread: float = 3.0, seed: int = 0) -> Tensor:
    return torch.randn(rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * spread


def _row(params: SamplingParams, tokens: Sequence[int] = (1, 2, 3), prompt: int | None = None) -> SamplingRow:
    return SamplingRow(params, tokens, len(tokens) if prompt is None else prompt)


def _draws(logits: Tensor, count: int, **params: float) -> list[int]:
    """Tokens for `count` seeds over one row of logits."""
    rows = [_row(SamplingParams(seed=seed, **params)) for seed in range(count)]  # type: ignore[arg-type]
    return [token.token_id for token in sample(logits.expand(count, -1), rows)]


def test_greedy_takes_the_first_of_equals() -> None:
    logits = torch.zeros(2, 1000)
    logits[0, [700, 30, 31]], logits[1, 999] = 2.0, 1.0
    assert [token.token_id for token in sample(logits, [_row(SamplingParams())] * 2)] == [30, 999]


def test_greedy_takes_the_largest() -> None:
    logits = _logits(5)
    tokens = sample(logits, [_row(SamplingParams(seed=seed)) for seed in range(5)])
    assert tokens == [SampledToken(int(best)) for best in logits.argmax(-1)]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_frequencies_follow_the_softmax(temperature: float) -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -torch.inf]])
    count = 20_000
    drawn = torch.tensor(_draws(logits, count, temperature=temperature)).bincount(minlength=5) / count
    expected = (logits[0] / temperature).softmax(-1)
    assert (drawn - expected).abs().max() < 0.01
    assert drawn[4] == 0


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 1}, {0}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.51}, {0, 1}),
        ({"top_p": 0.85}, {0, 1, 2}),
        ({"min_p": 0.61}, {0}),
        ({"min_p": 0.4}, {0, 1}),
        ({"min_p": 0.2}, {0, 1, 2}),
        ({"top_k": 2, "top_p": 0.6}, {0}),  # of what top_k left, the first holds 5 / 8
        ({"top_k": 3, "min_p": 0.5}, {0, 1}),
    ],
)
def test_truncation(params: dict[str, float], allowed: set[int]) -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert set(_draws(logits, 2000, temperature=1.0, **params)) == allowed


@pytest.mark.parametrize(
    "params",
    [
        {"top_p": 0.9},
        {"top_p": 0.9999},
        {"top_k": 300},
        {"top_k": 5000},
        {"min_p": 1e-4},
        {"min_p": 1e-4, "top_p": 0.8},
    ],
)
@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_truncation_reaches_past_the_first_candidates(params: dict[str, float], spread: float) -> None:
    """Against a plain sort of the whole vocabulary."""
    logits = _logits(1, spread)
    probabilities, ids = logits[0].double().softmax(-1).sort(descending=True)
    keep = torch.arange(VOCAB_SIZE) < params.get("top_k", VOCAB_SIZE)
    keep &= probabilities >= params.get("min_p", 0) * probabilities[0]
    probabilities = probabilities * keep / (probabilities * keep).sum()
    keep &= probabilities.cumsum(-1) - probabilities < params.get("top_p", 1)
    allowed = set(ids[keep].tolist())
    drawn = _draws(logits, 300, temperature=1.0, **params)
    assert set(drawn) <= allowed
    # Inversion over the same descending order, so even single draws must agree with the plain way.
    cumulative = (probabilities * keep).cumsum(-1)
    threshold = torch.from_numpy(uniforms(list(range(300)), [3] * 300)) * cumulative[-1]
    expected = ids[torch.searchsorted(cumulative, threshold, right=True)].tolist()
    assert sum(a != b for a, b in zip(drawn, expected, strict=True)) <= 1  # float32 exp against float64


def test_tokens_do_not_depend_on_the_batch() -> None:
    logits = _logits(6)
    params = [
        SamplingParams(temperature=0.8, seed=11),
        SamplingParams(),
        SamplingParams(temperature=1.2, top_p=0.9, seed=12),
        SamplingParams(temperature=1.2, top_k=40, min_p=0.01, seed=12),
        SamplingParams(temperature=1.5, top_p=0.99, repetition_penalty=1.3, seed=13),
        SamplingParams(temperature=0.8, seed=11, logprobs=2),
    ]
    rows = [_row(p, tuple(range(n + 2)), 1) for n, p in enumerate(params)]
    together = sample(logits, rows)
    for order in ([5, 3, 1], [4], [2, 0], [0, 1, 2, 3, 4, 5]):
        again = sample(logits[order], [rows[i] for i in order])
        assert again == [together[i] for i in order]


def test_seed_and_position_matter() -> None:
    logits = _logits(spread=0.1)
    base = SamplingParams(temperature=1.0, seed=5)
    tokens = {
        sample(logits, [row])[0].token_id
        for row in (_row(base), _row(base, (1, 2, 3, 4)), _row(SamplingParams(temperature=1.0, seed=6)))
    }
    assert len(tokens) == 3
    # The tokens so far, and how many of them are prompt, do not: a continued sequence draws the same.
    same = [_row(base, (9, 8, 7)), _row(base, (1, 2, 3), prompt=1)]
    assert len({token.token_id for token in sample(logits.expand(2, -1), same)}) == 1


def test_repetition_penalty_over_prompt_and_output() -> None:
    logits = torch.tensor([[4.0, 3.0, -1.0, -1.2]])
    params = SamplingParams(repetition_penalty=2.0, logprobs=0)
    assert sample(logits, [_row(params, (0, 2), 1)])[0].token_id == 1  # 4 / 2 < 3
    only_negative = torch.tensor([[-torch.inf, -torch.inf, -1.0, -1.2]])
    assert sample(only_negative, [_row(params, (2,), 1)])[0].token_id == 3  # -1 * 2 < -1.2


def test_presence_and_frequency_penalties_over_output_only() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.5]])
    presence, frequency = SamplingParams(presence_penalty=1.2), SamplingParams(frequency_penalty=0.4)
    assert sample(logits, [_row(presence, (0, 0), 2)])[0].token_id == 0  # prompt does not count
    assert sample(logits, [_row(presence, (0, 0), 1)])[0].token_id == 1  # 3 - 1.2 < 2
    assert sample(logits, [_row(frequency, (0, 0, 0), 1)])[0].token_id == 0  # 3 - 2 * 0.4 > 2
    assert sample(logits, [_row(frequency, (0, 0, 0), 0)])[0].token_id == 1  # 3 - 3 * 0.4 < 2


def test_logit_bias() -> None:
    logits = _logits()
    best = int(logits.argmax())
    banned = SamplingParams(logit_bias=((best, -100.0),))
    wanted = SamplingParams(logit_bias=((7, 100.0),), temperature=1.0)
    tokens = sample(logits.expand(2, -1), [_row(banned), _row(wanted)])
    assert tokens[0].token_id == int(logits[0].topk(2).indices[1])
    assert tokens[1].token_id == 7


def _bits(*tokens: int, size: int = 16) -> np.ndarray:
    bits = np.zeros(size, dtype=np.uint8)
    bits[list(tokens)] = 1
    return np.packbits(bits, bitorder="little")


@pytest.mark.parametrize("temperature", [0.0, 1.0, 100.0])
def test_only_allowed_tokens(temperature: float) -> None:
    logits = torch.linspace(10, 0, 13)[None]  # more bits than tokens
    params = SamplingParams(temperature=temperature, logit_bias=((1, 100.0),), logprobs=1)
    rows = [SamplingRow(params, [0] * n, n, allowed=_bits(9, 11, 14)) for n in range(1, 30)]
    free = _row(SamplingParams(logprobs=0))
    *tokens, last = sample(logits.expand(30, -1), [*rows, free])
    assert {token.token_id for token in tokens} == ({9} if temperature == 0 else {9, 11})
    assert tokens[0].top[0][0] == 0  # the model's own
    assert last.token_id == 0


def test_the_guide_wins_over_min_tokens() -> None:
    logits = torch.tensor([[5.0, 4.0, 3.0]])
    params = SamplingParams(min_tokens=9)
    for allowed, expected in (((1, 2), 1), ((0, 2), 2), ((0,), 0)):
        row = SamplingRow(params, [1], 1, allowed=_bits(*allowed))
        assert sample(logits, [row], eos_token_ids=(0,))[0].token_id == expected


def test_min_tokens_holds_back_end_and_stop_tokens() -> None:
    logits = torch.tensor([[5.0, 4.0, 3.0]])
    params = SamplingParams(min_tokens=2, stop_token_ids=(1,))
    held = [_row(params, (2, 2), 1), _row(params, (2, 2, 2), 1)]
    tokens = sample(logits.expand(2, -1), held, eos_token_ids=(0,))
    assert [token.token_id for token in tokens] == [2, 0]
    ignoring = SamplingParams(min_tokens=2, stop_token_ids=(1,), ignore_eos=True)
    assert sample(logits, [_row(ignoring)], eos_token_ids=(0,))[0].token_id == 0


def test_logprobs_are_the_models_own() -> None:
    logits = _logits(3)
    expected = logits.log_softmax(-1)
    rows = [
        _row(SamplingParams(logprobs=3)),
        _row(SamplingParams(temperature=0.5, logit_bias=((9, 100.0),), repetition_penalty=1.5, logprobs=0)),
        _row(SamplingParams()),
    ]
    first, second, third = sample(logits, rows)
    assert first.logprob == pytest.approx(float(expected[0].max()))
    assert [token for token, _ in first.top] == logits[0].topk(3).indices.tolist()
    assert first.top[0] == (first.token_id, first.logprob)
    assert second.token_id == 9
    assert second.logprob == pytest.approx(float(expected[1, 9]))
    assert second.top == ()
    assert third.logprob is None


def test_forced_token() -> None:
    logits = _logits(2)
    params = SamplingParams(temperature=1.0, top_k=1, logprobs=1)
    tokens = sample(logits, [SamplingRow(params, (1,), 1, forced_token_id=42), _row(params)])
    assert tokens[0].token_id == 42
    assert tokens[0].logprob == pytest.approx(float(logits[0].log_softmax(-1)[42]))
    assert tokens[0].top[0][0] == int(logits[0].argmax())
    assert tokens[1].token_id == int(logits[1].argmax())


def test_extreme_values_stay_in_the_vocabulary() -> None:
    logits = _logits(1, 1000)
    best = int(logits.argmax())
    for temperature in (1e-45, 1e-30, 1e-5):
        assert _draws(logits, 3, temperature=temperature) == [best] * 3
    nothing_left = torch.full((1, 5), -torch.inf)
    for params in (SamplingParams(), SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_p=0.5)):
        assert 0 <= sample(nothing_left, [_row(params)])[0].token_id < 5


def test_logits_are_not_changed() -> None:
    logits = _logits(2)
    before = logits.clone()
    params = SamplingParams(temperature=0.7, logit_bias=((3, 5.0),), frequency_penalty=1.0, min_tokens=9)
    sample(logits, [_row(params, (1, 1), 0)] * 2, eos_token_ids=(2,))
    assert torch.equal(logits, before)
