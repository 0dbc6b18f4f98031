"""Drawing a token: temperature, truncation to the best tokens, and inversion of the cumulative distribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.engine.sampling.params import SamplingParams

# Truncated distributions rarely reach further down than the best 256, which are found 20 times faster than a
# vocabulary is sorted. A row for which they do not suffice looks at more, with the same result.
CANDIDATE_COUNTS = (256, 4096)
MIN_TEMPERATURE = 1e-30  # float32 holds it; less would be 0


def draw(logits: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> list[int]:
    """One token id for each row of logits (rows, vocab), float32, chosen by the number in [0, 1) of that row.

    Each result depends on its own row alone.
    """
    temperatures = torch.tensor(
        [[max(row.temperature, MIN_TEMPERATURE)] for row in params], dtype=logits.dtype, device=logits.device
    )
    # The best logit becomes 0 before the division, so that no temperature overflows.
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperatures
    chosen = [0] * len(params)
    truncated = [index for index, row in enumerate(params) if is_truncated(row)]
    whole = [index for index, row in enumerate(params) if not is_truncated(row)]
    if whole:
        picks = invert(scaled[whole].exp(), _column([uniforms[index] for index in whole], scaled))
        for index, pick in zip(whole, picks.tolist(), strict=True):
            chosen[index] = pick
    for count in (*CANDIDATE_COUNTS, logits.shape[1]):
        if not truncated:
            break
        best, ids = scaled[truncated].topk(min(count, logits.shape[1]))
        weights, enough = truncate(best, scaled[truncated], limits_of([params[index] for index in truncated], best))
        picks = invert(weights, _column([uniforms[index] for index in truncated], weights))
        tokens = ids.gather(1, picks[:, None])[:, 0].tolist()
        for index, token in zip(truncated, tokens, strict=True):
            chosen[index] = token  # of a row that has not seen enough, overwritten in the next round
        truncated = [index for index, done in zip(truncated, enough.tolist(), strict=True) if not done]
    return chosen


def is_truncated(params: SamplingParams) -> bool:
    """Whether only some of the tokens can be drawn."""
    return params.top_p < 1 or params.top_k > 0 or params.min_p > 0


@dataclass(frozen=True, slots=True)
class Limits:
    """What is cut off in each row, (rows, 1) float64 each; top_k is infinite where it is off."""

    top_k: Tensor
    min_p: Tensor
    top_p: Tensor


def limits_of(params: Sequence[SamplingParams], like: Tensor) -> Limits:
    """The limits of rows, on the device of `like`."""
    return Limits(
        _column([row.top_k or torch.inf for row in params], like),
        _column([row.min_p for row in params], like),
        _column([row.top_p for row in params], like),
    )


def truncate(best: Tensor, scaled: Tensor, limits: Limits) -> tuple[Tensor, Tensor]:
    """Weights (rows, candidates) with 0 for what is cut, and (rows,) whether the candidates were enough to tell.

    best (rows, candidates) are the largest of scaled (rows, vocab), descending. Each cut keeps a first part of the
    candidates: min_p and top_k first, then top_p of the probability that they left.
    """
    num_candidates, vocab_size = best.shape[1], scaled.shape[1]
    weights = best.exp().double()  # relative to the best token
    top_k, min_p = limits.top_k, limits.min_p
    kept = (torch.arange(num_candidates, device=best.device) < top_k) & (weights >= min_p)
    weights = weights * kept
    cumulative = weights.cumsum(-1)
    # What min_p or top_k left is known if they cut within the candidates; with neither of them it is everything.
    known = ~kept[:, -1:] | (top_k <= num_candidates) | (num_candidates == vocab_size)
    everything = (top_k >= vocab_size) & (min_p == 0)
    total = torch.where(known, cumulative[:, -1:], scaled.exp().sum(-1, keepdim=True, dtype=torch.float64))
    goal = limits.top_p * total
    weights = weights * (cumulative - weights < goal)
    enough = known | (everything & (cumulative[:, -1:] >= goal))
    return weights, enough[:, 0]


def invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """(rows,) the first index at which the running sum of weights (rows, n) passes the share (rows, 1) of the whole."""
    cumulative = weights.double().cumsum(-1)
    threshold = uniforms * cumulative[:, -1:]
    picks = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
    # Rounding may put the threshold at the very end: the last index that has a weight.
    last = (cumulative < cumulative[:, -1:]).sum(-1)
    return torch.minimum(picks, last)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]
