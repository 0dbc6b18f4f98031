"""Linear layers of a team inside models of transformers."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from services.engine.kernels.team import team_of
from services.engine.model.foreign.linears import replace_linears
from services.engine.model.linear.linear import DenseLinear, Linear
from services.engine.model.linear.tiled import TiledLinear

LINEARS = (torch.nn.Linear, Conv1D)


class _Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = Conv1D(40, 24)
        self.down = torch.nn.Linear(40, 24, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.down(torch.relu(self.up(inputs)))


def _model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(_Block(), _Block(), torch.nn.LayerNorm(24), torch.nn.Linear(24, 7))


@torch.inference_mode()
@pytest.mark.parametrize("shape", [(24,), (1, 24), (5, 24), (2, 3, 24), (0, 24), (2, 0, 24)])
def test_computes_what_torch_does(shape: tuple[int, ...]) -> None:
    """Whatever comes before the last dimension: an expert that no token chose is given none."""
    model, inputs = _model(), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    expected = model(inputs)
    replace_linears(model, lambda weight, bias: TiledLinear(weight, bias, team_of(2)))
    assert not [layer for layer in model.modules() if isinstance(layer, LINEARS)]
    torch.testing.assert_close(model(inputs), expected)


@torch.inference_mode()
def test_parameters_may_lie_in_others() -> None:
    """As those do that were one tensor in the checkpoint."""
    layer = torch.nn.Linear(24, 40)
    layer.weight = torch.nn.Parameter(torch.randn(24, 80).T[::2])
    layer.bias = torch.nn.Parameter(torch.randn(80)[::2])
    model, inputs = torch.nn.Sequential(layer), torch.randn(3, 24)
    expected = model(inputs)
    replace_linears(model, lambda weight, bias: TiledLinear(weight, bias, team_of(2)))
    torch.testing.assert_close(model(inputs), expected)


@torch.inference_mode()
def test_a_weight_can_be_asked_for_but_not_read() -> None:
    """What stands in its place must fail where it is read: torch multiplies by a meta tensor, and gives anything."""
    model, inputs = torch.nn.Sequential(torch.nn.Linear(24, 40)), torch.randn(3, 24)
    of_torch = model[0].weight
    replace_linears(model, DenseLinear)
    weight: Any = model[0].weight
    assert (weight.shape, weight.dtype, weight.device) == (of_torch.shape, of_torch.dtype, of_torch.device)
    with pytest.raises(TypeError):
        torch.nn.functional.linear(inputs, weight)
    with pytest.raises(TypeError):
        weight[:, :3]


@torch.inference_mode()
def test_a_weight_is_let_go_before_the_next_is_replaced() -> None:
    """Else a model would take twice its memory while it is loaded."""
    model = _model()
    of_torch = [weakref.ref(layer) for layer in model.modules() if isinstance(layer, LINEARS)]
    alive = []

    def make(weight: Tensor, bias: Tensor | None) -> Linear:
        alive.append(sum(layer() is not None for layer in of_torch))
        return DenseLinear(weight.clone(), bias)

    replace_linears(model, make)
    assert alive == [5, 4, 3, 2, 1]
