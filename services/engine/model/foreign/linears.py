"""Linear layers of ours in the place of its own, inside a model of transformers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from services.engine.model.linear.linear import Linear, LinearFactory


def replace_linears(model: torch.nn.Module, make: LinearFactory) -> None:
    """Every linear layer of the model, torch's and those of GPT-2's kind, becomes what `make` gives for its weight and
    bias."""
    from transformers.pytorch_utils import Conv1D

    # Nothing here keeps a layer that was replaced: its weight is let go before the next one is made.
    for parent in model.modules():
        names = [name for name, child in parent.named_children() if type(child) in (torch.nn.Linear, Conv1D)]
        for name in names:
            setattr(parent, name, _in_place_of(getattr(parent, name), make))


@dataclass(frozen=True, slots=True)
class _Described:
    """What a model may ask of a weight without reading it: some choose a dtype or a device by it. No tensor of the
    meta device, because torch multiplies by one without an error, and what comes of it is whatever memory held."""

    shape: torch.Size  # (out, in), or (in, out) of a Conv1D
    dtype: torch.dtype
    device: torch.device


class _InPlaceOfLinear(torch.nn.Module):
    """See torch.nn.Linear."""

    def __init__(self, layer: Linear, weight: _Described) -> None:
        super().__init__()
        self._layer = layer
        self.weight = weight

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs (..., in) to (..., out)."""
        leading = inputs.shape[:-1]
        rows = self._layer(inputs.reshape(math.prod(leading), inputs.shape[-1]))
        return rows.view(*leading, rows.shape[-1])


def _in_place_of(layer: Any, make: LinearFactory) -> _InPlaceOfLinear:
    weight = layer.weight.detach()
    bias = None if layer.bias is None else layer.bias.detach().contiguous()  # kernels know only where it begins
    made = make(weight if isinstance(layer, torch.nn.Linear) else weight.T, bias)  # a Conv1D has (in, out)
    return _InPlaceOfLinear(made, _Described(weight.shape, weight.dtype, weight.device))
