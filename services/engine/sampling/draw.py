"""Drawing a token: temperature, truncation to the best tokens, and inversion of the cumulative distribution."""

from __future__ import annotations

from collections.abc import Sequence

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
    truncated = [index for index, row in enumerate(params) if _is_truncated(row)]
    whole = [index for index, row in enumerate(params) if not _is_truncated(row)]
    if whole:
        picks = _invert(scaled[whole].exp(), [uniforms[index] for index in whole])
        for index, pick in zip(whole, picks.tolist(), strict=True):
            chosen[index] = pick
    for count in (*CANDIDATE_COUNTS, logits.shape[1]):
        if not truncated:
            break
        best, ids = scaled[truncated].topk(min(count, logits.shape[1]))
        weights, enough = _truncate(best, scaled[truncated], [params[index] for index in truncated])
        picks = _invert(weights, [uniforms[index] for index in truncated])
        tokens = ids.gather(1, picks[:, None])[:, 0].tolist()
        for index, token in zip(truncated, tokens, strict=True):
            chosen[index] = token  # of a row that has not seen enough, overwritten in the next round
        truncated = [index for index, done in zip(truncated, enough.tolist(), strict=True) if not done]
    return chosen


def _is_truncated(params: SamplingParams) -> bool:
    return params.top_p < 1 or params.top_k > 0 or params.min_p > 0


def _truncate(best: Tensor, scaled: Tensor, params: Sequence[SamplingParams]) -> tuple[Tensor, Tensor]:
    """Weights (rows, candidates) with 0 for what is cut, and (rows,) whether the candidates were enough to tell.

    best (rows, candidates) are the largest of scaled (rows, vocab), descending. Each cut keeps a first part of the
    candidates: min_p and top_k first, then top_p of the probability that they left.
    """
    num_candidates, vocab_size = best.shape[1], scaled.shape[1]
    weights = best.exp().double()  # relative to the best token
    top_k = _column([row.top_k or vocab_size for row in params], best)
    min_p = _column([row.min_p for row in params], best)
    kept = (torch.arange(num_candidates, device=best.device) < top_k) & (weights >= min_p)
    weights = weights * kept
    cumulative = weights.cumsum(-1)
    # What min_p or top_k left is known if they cut within the candidates; with neither of them it is everything.
    known = ~kept[:, -1:] | (top_k <= num_candidates) | (num_candidates == vocab_size)
    everything = (top_k >= vocab_size) & (min_p == 0)
    total = torch.where(known, cumulative[:, -1:], scaled.exp().sum(-1, keepdim=True, dtype=torch.float64))
    goal = _column([row.top_p for row in params], best) * total
    weights = weights * (cumulative - weights < goal)
    enough = known | (everything & (cumulative[:, -1:] >= goal))
    return weights, enough[:, 0]


def _invert(weights: Tensor, uniforms: Sequence[float]) -> Tensor:
    """(rows,) the first index at which the running sum of weights (rows, n) passes that share of the whole."""
    cumulative = weights.double().cumsum(-1)
    threshold = _column(uniforms, cumulative) * cumulative[:, -1:]
    picks = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
    # Rounding may put the threshold at the very end: the last index that has a weight.
    last = (cumulative < cumulative[:, -1:]).sum(-1)
    return torch.minimum(picks, last)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]
