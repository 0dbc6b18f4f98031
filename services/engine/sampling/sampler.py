"""The next token of every sequence of a step."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.engine.largest import largest
from services.engine.sampling.adjust import adjust, restrict
from services.engine.sampling.draw import draw
from services.engine.sampling.params import SamplingParams
from services.engine.sampling.philox import uniforms


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """One sequence at the moment its next token is chosen."""

    params: SamplingParams
    token_ids: Sequence[int]  # prompt and output so far; only read, and only during the call
    num_prompt_tokens: int  # the tokens after these count as output
    forced_token_id: int | None = None  # taken whatever the logits say; log-probabilities stay the model's
    allowed: NDArray[np.uint8] | None = None  # a bit a token id, the least significant of a byte first; None: any

    @property
    def position(self) -> int:
        """Absolute position of the token being chosen."""
        return len(self.token_ids)

    @property
    def output_length(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A chosen token; natural log-probabilities are the model's own, before temperature, bias and penalties."""

    token_id: int
    logprob: float | None = None  # None unless SamplingParams.logprobs asked
    top: tuple[tuple[int, float], ...] = ()  # the most probable tokens, best first


@torch.inference_mode()
def sample(logits: Tensor, rows: Sequence[SamplingRow], eos_token_ids: Collection[int] = ()) -> list[SampledToken]:
    """One token for each row of logits, (rows, vocab) float32 on any device; logits are not changed.

    Random choices depend on (seed, position) and the row's own logits only, so a sequence goes on with the same
    tokens in another batch or on another engine.
    """
    adjusted = _adjusted(logits, rows, eos_token_ids)
    tokens: list[int] = largest(adjusted).tolist()
    random = [i for i, row in enumerate(rows) if not row.params.is_greedy and row.forced_token_id is None]
    if random:
        params = [rows[i].params for i in random]
        numbers = uniforms([p.seed for p in params], [rows[i].position for i in random])
        for i, token in zip(random, draw(adjusted[random], params, numbers.tolist()), strict=True):
            tokens[i] = token
    for i, row in enumerate(rows):
        if row.forced_token_id is not None:
            tokens[i] = row.forced_token_id
    return _report(logits, rows, tokens)


def _adjusted(logits: Tensor, rows: Sequence[SamplingRow], eos_token_ids: Collection[int]) -> Tensor:
    changed = [
        i for i, row in enumerate(rows) if row.allowed is not None or row.params.changes_logits(row.output_length)
    ]
    if not changed:
        return logits
    adjusted = logits.clone()
    for i in changed:
        row = rows[i]
        adjust(adjusted[i], row.params, row.token_ids, row.num_prompt_tokens, eos_token_ids)
        if row.allowed is not None:
            restrict(adjusted[i], logits[i], row.allowed)
    return adjusted


def _report(logits: Tensor, rows: Sequence[SamplingRow], tokens: Sequence[int]) -> list[SampledToken]:
    sampled = [SampledToken(token) for token in tokens]
    asked = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    if asked:
        logprobs = logits[asked].log_softmax(-1)
        num_top = max(rows[i].params.logprobs or 0 for i in asked)
        best = logprobs.topk(num_top)
        values, ids = best.values.tolist(), best.indices.tolist()
        chosen = logprobs.gather(1, torch.tensor([[tokens[i]] for i in asked], device=logits.device))[:, 0].tolist()
        for n, i in enumerate(asked):
            top = tuple(zip(ids[n], values[n], strict=True))[: rows[i].params.logprobs]
            sampled[i] = SampledToken(tokens[i], chosen[n], top)
    return sampled
