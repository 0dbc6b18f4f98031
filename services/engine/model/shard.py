"""Tensor parallel: which part of a model one rank holds, and how the parts make a whole.

The split of Megatron-LM (arXiv 1909.08053, section 3): queries, keys, values, gate and up are cut by output, the two
projections back into the hidden state by input, so a layer adds up its ranks' results twice and needs nothing else.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from services.engine.model.config import ModelConfig
from services.engine.model.errors import UnsupportedModel
from services.engine.model.linear.linear import Linear


class Collective(Protocol):
    """What the ranks of one replica do together. Every rank calls the same in the same order; a call blocks until all
    have come, and raises RuntimeError if one is gone or takes too long."""

    def add(self, values: Tensor) -> None:
        """Replaces `values` on every rank by the sum over all ranks."""

    def collect(self, values: Tensor) -> Tensor:
        """On rank 0 the (rows, columns) of all ranks beside each other, in the order of ranks; elsewhere `values`."""


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of `rank` among `count`; without a collective it is the whole."""

    rank: int = 0
    count: int = 1
    collective: Collective | None = None

    def part(self, size: int) -> slice:
        """This rank's share of `size` rows, columns or heads, which divide evenly."""
        share = size // self.count
        return slice(self.rank * share, (self.rank + 1) * share)

    def of(self, config: ModelConfig) -> ModelConfig:
        """The configuration of this rank's part. Raises UnsupportedModel if something does not divide."""
        for what, size in (
            ("attention heads", config.num_heads),
            ("key-value heads", config.num_kv_heads),
            ("units of the MLP", config.intermediate_size),
            ("entries of the vocabulary", config.vocab_size),
        ):
            if size % self.count:
                raise UnsupportedModel(f"{size} {what} do not divide among {self.count} ranks.")
        return dataclasses.replace(
            config,
            num_heads=config.num_heads // self.count,
            num_kv_heads=config.num_kv_heads // self.count,
            intermediate_size=config.intermediate_size // self.count,
        )

    def summed(self, layer: Linear, bias: Tensor | None) -> Linear:
        """A layer that was cut by input: the ranks' results added up, and then the bias, once."""
        return layer if self.collective is None else _Summed(layer, bias, self.collective)

    def collected(self, layer: Linear) -> Linear:
        """A layer that was cut by output and whose whole result rank 0 needs."""
        return layer if self.collective is None else _Collected(layer, self.collective)


WHOLE = Shard()


@dataclass(frozen=True, slots=True)
class _Summed:
    layer: Linear
    bias: Tensor | None
    collective: Collective

    def __call__(self, rows: Tensor) -> Tensor:
        result = self.layer(rows)
        self.collective.add(result)
        return result if self.bias is None else result.add_(self.bias)


@dataclass(frozen=True, slots=True)
class _Collected:
    layer: Linear
    collective: Collective

    def __call__(self, rows: Tensor) -> Tensor:
        return self.collective.collect(self.layer(rows))
