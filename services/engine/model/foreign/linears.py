"""Linear layers of ours in the place of torch's, inside a model of transformers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from services.engine.model.linear.linear import Linear, LinearFactory


def replace_linears(model: torch.nn.Module, make: LinearFactory) -> None:
    """Every torch.nn.Linear of the model becomes what `make` gives for its weight and bias."""
    # Nothing here keeps a layer that was replaced: its weight is let go before the next one is made.
    for parent in model.modules():
        names = [name for name, child in parent.named_children() if type(child) is torch.nn.Linear]
        for name in names:
            setattr(parent, name, _InPlaceOfLinear(_made(getattr(parent, name), make)))


class _InPlaceOfLinear(torch.nn.Module):
    """See torch.nn.Linear."""

    def __init__(self, layer: Linear) -> None:
        super().__init__()
        self._layer = layer

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs (..., in) to (..., out)."""
        leading = inputs.shape[:-1]
        rows = self._layer(inputs.reshape(math.prod(leading), inputs.shape[-1]))
        return rows.view(*leading, rows.shape[-1])


def _made(layer: torch.nn.Linear, make: LinearFactory) -> Linear:
    return make(layer.weight.detach(), None if layer.bias is None else layer.bias.detach())
