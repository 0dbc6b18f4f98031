"""Choosing tokens without waiting for the device: the plain form is sampling/sampler.py, and both choose the same.

The random numbers are computed on the CPU, where seeds and positions are known: eight bytes a row. Rows that truncate
sort all of the vocabulary, because whether a few candidates suffice would have to be asked of the device.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from services.engine.core.plan import Chosen, SampleSpec
from services.engine.gpu.adjusting import adjustments
from services.engine.gpu.packing import Packed, Packer, Place
from services.engine.sampling.draw import MIN_TEMPERATURE, Limits, invert, is_truncated, truncate
from services.engine.sampling.philox import uniforms


@dataclass(frozen=True, slots=True)
class _Draw:
    """Some rows, and for each temperature, random number, top_k, min_p and top_p."""

    rows: Place
    numbers: Place

    def read(self, packed: Packed, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Row numbers; the table; and the rows' logits, the best 0, divided by the temperature."""
        rows, numbers = packed[self.rows], packed[self.numbers]
        own = logits[rows]
        return rows, numbers, (own - own.amax(-1, keepdim=True)) / numbers[:, :1].to(own.dtype)


@dataclass(frozen=True, slots=True)
class Choices:
    """What was chosen in a step, on the device; read by result() once it is on the CPU."""

    tokens: Tensor  # (rows,) int64
    logprobs: Tensor  # (asked, 1 + most alternatives) float32: of the token itself, then the most probable ones
    top_ids: Tensor  # (asked, most alternatives) int64


class Chooser:
    """The choices of one step, prepared before its logits are known."""

    def __init__(self, packer: Packer, specs: Sequence[SampleSpec], eos_token_ids: Collection[int]) -> None:
        self._specs = specs
        self._adjustments = adjustments(packer, specs, eos_token_ids)
        forced = [-1 if spec.forced_token_id is None else spec.forced_token_id for spec in specs]
        self._forced = packer.integers(forced) if max(forced, default=-1) >= 0 else None
        random = [n for n, spec in enumerate(specs) if not spec.params.is_greedy and spec.forced_token_id is None]
        self._whole = self._draw(packer, [n for n in random if not is_truncated(specs[n].params)])
        self._cut = self._draw(packer, [n for n in random if is_truncated(specs[n].params)])
        self._asked = [n for n, spec in enumerate(specs) if spec.params.logprobs is not None]
        self._asked_rows = packer.integers(self._asked)

    def choose(self, packed: Packed, logits: Tensor, newest: Tensor) -> Choices:
        """For logits (rows, vocab) float32, which stay as they are; newest (rows,) are the sequences' last tokens."""
        adjusted = logits.clone() if self._adjustments else logits
        for adjust in self._adjustments:
            adjusted = adjust(packed, adjusted, logits, newest)
        tokens = adjusted.argmax(-1)
        if self._whole is not None:
            rows, numbers, scaled = self._whole.read(packed, adjusted)
            tokens[rows] = invert(scaled.exp(), numbers[:, 1:2])
        if self._cut is not None:
            rows, numbers, scaled = self._cut.read(packed, adjusted)
            best, ids = scaled.sort(-1, descending=True)
            weights, _ = truncate(best, scaled, Limits(numbers[:, 2:3], numbers[:, 3:4], numbers[:, 4:5]))
            tokens[rows] = ids.gather(1, invert(weights, numbers[:, 1:2])[:, None])[:, 0]
        if self._forced is not None:
            forced = packed[self._forced]
            tokens = torch.where(forced >= 0, forced, tokens)
        return self._with_logprobs(packed, logits, tokens)

    def result(self, choices: Choices) -> list[Chosen]:
        """The same as plain data; the tensors are on the CPU."""
        chosen = [Chosen(token) for token in choices.tokens.tolist()]
        rows = zip(self._asked, choices.logprobs.tolist(), choices.top_ids.tolist(), strict=True)
        for n, (own, *best), ids in rows:
            top = tuple(zip(ids, best, strict=True))[: self._specs[n].params.logprobs]
            chosen[n] = Chosen(chosen[n].token_id, own, top)
        return chosen

    def _with_logprobs(self, packed: Packed, logits: Tensor, tokens: Tensor) -> Choices:
        if not self._asked:
            return Choices(tokens, logits.new_empty(0, 1), tokens.new_empty(0, 0))
        rows = packed[self._asked_rows]
        logprobs = logits[rows].log_softmax(-1)
        best = logprobs.topk(max(self._specs[n].params.logprobs or 0 for n in self._asked))
        own = logprobs.gather(1, tokens[rows][:, None])
        return Choices(tokens, torch.cat((own, best.values), dim=1), best.indices)

    def _draw(self, packer: Packer, rows: list[int]) -> _Draw | None:
        if not rows:
            return None
        params = [self._specs[n].params for n in rows]
        drawn = uniforms([each.seed for each in params], [self._specs[n].position for n in rows])
        table = [
            (max(each.temperature, MIN_TEMPERATURE), number, each.top_k or np.inf, each.min_p, each.top_p)
            for each, number in zip(params, drawn, strict=True)
        ]
        return _Draw(packer.integers(rows), packer.numbers(table))
