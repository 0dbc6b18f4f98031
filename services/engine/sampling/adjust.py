"""Changes to single logits that a request asked for: bias, end tokens held back, penalties, what a guide forbids."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.engine.sampling.params import SamplingParams


def adjust(
    logits: Tensor,
    params: SamplingParams,
    token_ids: Sequence[int],
    num_prompt_tokens: int,
    eos_token_ids: Collection[int],
) -> None:
    """Changes one row, logits (vocab,) float32, in place. token_ids are prompt and output so far."""
    if params.logit_bias:
        ids, biases = zip(*params.logit_bias, strict=True)
        logits[_index(ids, logits)] += torch.tensor(biases, dtype=logits.dtype, device=logits.device)
    if len(token_ids) - num_prompt_tokens < params.min_tokens:
        held_back = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}
        logits[_index(sorted(held_back), logits)] = -torch.inf
    if params.repetition_penalty != 1:
        seen = _index(np.unique(np.asarray(token_ids, dtype=np.int64)), logits)
        values = logits[seen]
        penalty = params.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    output = np.asarray(token_ids[num_prompt_tokens:], dtype=np.int64)
    if output.size and (params.presence_penalty or params.frequency_penalty):
        produced, counts = np.unique(output, return_counts=True)
        amounts = params.presence_penalty + params.frequency_penalty * counts
        logits[_index(produced, logits)] -= torch.tensor(amounts, dtype=logits.dtype, device=logits.device)


def restrict(adjusted: Tensor, logits: Tensor, allowed: NDArray[np.uint8]) -> None:
    """Leaves only the allowed tokens in one row, adjusted (vocab,); allowed has a bit a token, lowest first.

    Where min_tokens holds back all that may follow, the guide wins: logits (vocab,) are the model's own.
    """
    bits = np.unpackbits(allowed, count=logits.shape[0], bitorder="little").view(np.bool_)
    forbidden = torch.from_numpy(~bits).to(logits.device)
    adjusted.masked_fill_(forbidden, -torch.inf)
    if not adjusted.isfinite().any():
        adjusted.copy_(logits.masked_fill(forbidden, -torch.inf))


def _index(ids: Sequence[int] | np.ndarray, logits: Tensor) -> Tensor:
    return torch.as_tensor(np.asarray(ids, dtype=np.int64), device=logits.device)
