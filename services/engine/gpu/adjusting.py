"""Changes to logits that requests asked for, on the device: the plain form is sampling/adjust.py, one row at a time.

Tokens that the step before chose are not known when this is prepared, so they are counted on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from services.engine.core.plan import SampleSpec
from services.engine.gpu.packing import Packed, Packer, Place

# From what was sent, logits (rows, vocab) that may be changed in place, the model's own, and the sequences' last tokens
# (rows,), to changed logits.
Adjust = Callable[[Packed, Tensor, Tensor, Tensor], Tensor]


def adjustments(packer: Packer, specs: Sequence[SampleSpec], eos_token_ids: Collection[int]) -> list[Adjust]:
    """What is to be done, in the order that SamplingParams gives; empty if no row asks for anything."""
    made = (_biases(packer, specs), _held_back(packer, specs, eos_token_ids), _repetition(packer, specs),
            _presence_and_frequency(packer, specs), _guides(packer, specs))  # fmt: skip
    return [adjust for adjust in made if adjust is not None]


def _biases(packer: Packer, specs: Sequence[SampleSpec]) -> Adjust | None:
    pairs = [(row, *pair) for row, spec in enumerate(specs) for pair in spec.params.logit_bias]
    if not pairs:
        return None
    rows, ids, biases = zip(*pairs, strict=True)
    where, amounts = packer.integers((rows, ids)), packer.numbers(biases)

    def adjust(packed: Packed, adjusted: Tensor, logits: Tensor, newest: Tensor) -> Tensor:
        adjusted[tuple(packed[where])] += packed[amounts].to(adjusted.dtype)  # no token is named twice in a row
        return adjusted

    return adjust


def _held_back(packer: Packer, specs: Sequence[SampleSpec], eos_token_ids: Collection[int]) -> Adjust | None:
    pairs = [
        (row, token)
        for row, spec in enumerate(specs)
        if spec.position - spec.num_prompt_tokens < spec.params.min_tokens
        for token in (*spec.params.stop_token_ids, *(() if spec.params.ignore_eos else eos_token_ids))
    ]
    if not pairs:
        return None
    where = packer.integers(np.array(pairs).T)

    def adjust(packed: Packed, adjusted: Tensor, logits: Tensor, newest: Tensor) -> Tensor:
        adjusted[tuple(packed[where])] = -torch.inf
        return adjusted

    return adjust


def _repetition(packer: Packer, specs: Sequence[SampleSpec]) -> Adjust | None:
    asked = [row for row, spec in enumerate(specs) if spec.params.repetition_penalty != 1]
    if not asked:
        return None
    history = _History(packer, [specs[row] for row in asked], lambda spec: spec.token_ids)
    rows = packer.integers(asked)
    amounts = packer.numbers([[specs[row].params.repetition_penalty] for row in asked])

    def adjust(packed: Packed, adjusted: Tensor, logits: Tensor, newest: Tensor) -> Tensor:
        values, penalty = adjusted[packed[rows]], packed[amounts].to(adjusted.dtype)
        seen = history.counts(packed, values, newest[packed[rows]]) > 0
        adjusted[packed[rows]] = torch.where(seen, torch.where(values > 0, values / penalty, values * penalty), values)
        return adjusted

    return adjust


def _presence_and_frequency(packer: Packer, specs: Sequence[SampleSpec]) -> Adjust | None:
    asked = [row for row, spec in enumerate(specs) if spec.params.presence_penalty or spec.params.frequency_penalty]
    if not asked:
        return None
    history = _History(packer, [specs[row] for row in asked], lambda spec: spec.token_ids[spec.num_prompt_tokens :])
    rows = packer.integers(asked)
    amounts = packer.numbers(
        [(specs[row].params.presence_penalty, specs[row].params.frequency_penalty) for row in asked]
    )

    def adjust(packed: Packed, adjusted: Tensor, logits: Tensor, newest: Tensor) -> Tensor:
        values = adjusted[packed[rows]]
        counts = history.counts(packed, values, newest[packed[rows]]).double()
        presence, frequency = packed[amounts][:, :1], packed[amounts][:, 1:]
        adjusted[packed[rows]] = values - ((counts > 0) * presence + counts * frequency).to(values.dtype)
        return adjusted

    return adjust


class _History:
    """How often each token stands in some part of each row's sequence, the awaited one included."""

    def __init__(
        self, packer: Packer, specs: Sequence[SampleSpec], part: Callable[[SampleSpec], Sequence[int]]
    ) -> None:
        parts = [part(spec) for spec in specs]
        self._rows = packer.integers(np.repeat(np.arange(len(specs)), [len(each) for each in parts]))
        self._ids = packer.add(_flat(parts))
        self._awaited = packer.numbers([spec.num_awaited for spec in specs])

    def counts(self, packed: Packed, values: Tensor, newest: Tensor) -> Tensor:
        """(rows, vocab) float32: whole numbers, so the order of adding does not matter."""
        counts = torch.zeros_like(values, dtype=torch.float32)
        ones = torch.ones((), device=values.device).expand(packed[self._ids].shape)
        counts.index_put_((packed[self._rows], packed[self._ids]), ones, accumulate=True)
        return counts.scatter_add_(1, newest[:, None], packed[self._awaited].float()[:, None])


def _guides(packer: Packer, specs: Sequence[SampleSpec]) -> Adjust | None:
    guided = [(row, spec.allowed) for row, spec in enumerate(specs) if spec.allowed is not None]
    if not guided:
        return None
    rows = packer.integers([row for row, _ in guided])
    masks: Place = packer.add(np.stack([allowed for _, allowed in guided]))

    def adjust(packed: Packed, adjusted: Tensor, logits: Tensor, newest: Tensor) -> Tensor:
        bits = packed[masks][:, :, None] >> torch.arange(8, dtype=torch.uint8, device=adjusted.device) & 1
        forbidden = bits.flatten(1)[:, : adjusted.shape[1]] == 0
        kept = adjusted[packed[rows]].masked_fill(forbidden, -torch.inf)
        # Where min_tokens holds back all that may follow, the guide wins.
        is_empty = ~kept.isfinite().any(-1, keepdim=True)
        adjusted[packed[rows]] = torch.where(is_empty, logits[packed[rows]].masked_fill(forbidden, -torch.inf), kept)
        return adjusted

    return adjust


def _flat(parts: Iterable[Sequence[int]]) -> np.ndarray:
    return np.fromiter(chain.from_iterable(parts), dtype=np.int64)
