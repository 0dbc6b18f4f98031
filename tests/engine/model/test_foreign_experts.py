"""Experts as linear layers of a team inside models of transformers."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from services.engine.kernels.team import team_of
from services.engine.model.foreign.experts import replace_experts
from services.engine.model.linear.linear import Linear
from services.engine.model.linear.tiled import TiledLinear

NUM_EXPERTS, HIDDEN = 5, 24
SIZES = {"num_local_experts": NUM_EXPERTS, "hidden_size": HIDDEN, "intermediate_size": 40}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def _layer(kind: str) -> Any:
    """Experts of a kind, alone in a module. GPT-OSS's have biases, weights the other way round and a gate of their
    own."""
    from transformers import GptOssConfig, MixtralConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    torch.manual_seed(0)
    config = (MixtralConfig if kind == "mixtral" else GptOssConfig)(**SIZES)
    config._experts_implementation = "batched_mm"
    experts = (MixtralExperts if kind == "mixtral" else GptOssExperts)(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return torch.nn.ModuleDict({"experts": experts})


def _make(weight: Tensor, bias: Tensor | None) -> Linear:
    return TiledLinear(weight, bias, team_of(2))


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss"])
@pytest.mark.parametrize("num_tokens", [1, 2, 30])
def test_computes_what_torch_does(kind: str, num_tokens: int) -> None:
    layer, random = _layer(kind), torch.Generator().manual_seed(num_tokens)
    rows = torch.randn(num_tokens, HIDDEN, generator=random)
    weights, chosen = torch.rand(num_tokens, NUM_EXPERTS, generator=random).topk(2)
    expected = layer["experts"](rows, chosen, weights)
    replace_experts(layer, _make, team_of(2))
    assert not list(layer.parameters())
    torch.testing.assert_close(layer["experts"](rows, chosen, weights), expected)


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss"])
def test_experts_as_the_oldest_transformers_describes_them_are_known(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """5.0.0 says of none whether it has a gate or a norm behind it."""
    layer, rows = _layer(kind), torch.randn(3, HIDDEN)
    weights, chosen = torch.rand(3, NUM_EXPERTS).topk(2)
    expected = layer["experts"](rows, chosen, weights)
    for name in ("has_gate", "has_post_expert_norm"):
        delattr(layer["experts"], name)
    replace_experts(layer, _make, team_of(2))
    assert not list(layer.parameters())
    torch.testing.assert_close(layer["experts"](rows, chosen, weights), expected)
    assert not caplog.records


class Unknown(torch.nn.Module):
    """Experts by their weights, of which nothing is said."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(torch.zeros(2, 3, 4))


def test_what_stays_with_torch_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    convolution = torch.nn.Conv1d(2, 2, 3)
    model = torch.nn.ModuleList([Unknown(), Unknown(), convolution, _layer("mixtral")])
    replace_experts(model, _make, team_of(2))
    assert len(list(model.parameters())) == 2 + len(list(convolution.parameters()))
    [record] = caplog.records
    assert record.__dict__["fields"] == {"modules": "Unknown"}


@torch.inference_mode()
def test_an_expert_that_there_is_not_adds_nothing() -> None:
    """So some models say that a token needs fewer."""
    layer, rows = _layer("mixtral"), torch.randn(3, HIDDEN)
    layer["experts"].config._experts_implementation = "eager"
    for chosen in ([[0, 5], [5, 5], [4, 0]], [[5, 5]] * 3):
        given = torch.tensor(chosen), torch.rand(3, 2)
        expected = layer["experts"](rows, *given)
        replaced = _layer("mixtral")
        replace_experts(replaced, _make, team_of(2))
        torch.testing.assert_close(replaced["experts"](rows, *given), expected)


@torch.inference_mode()
def test_a_row_has_the_same_bits_in_any_company() -> None:
    layer, rows = _layer("mixtral"), torch.randn(20, HIDDEN)
    replace_experts(layer, _make, team_of(2))
    weights, chosen = torch.rand(20, NUM_EXPERTS).topk(3)
    together = layer["experts"](rows, chosen, weights)
    for row in range(20):
        alone = layer["experts"](*(each[row : row + 1] for each in (rows, chosen, weights)))
        assert torch.equal(alone[0], together[row])


@torch.inference_mode()
def test_weights_of_one_layer_are_let_go_before_those_of_the_next_are_replaced() -> None:
    model = torch.nn.ModuleList([_layer("mixtral"), _layer("mixtral")])
    of_torch = [weakref.ref(parameter) for parameter in model.parameters()]
    alive = []

    def make(weight: Tensor, bias: Tensor | None) -> Linear:
        alive.append(sum(parameter() is not None for parameter in of_torch))
        return _make(weight, bias)

    replace_experts(model, make, team_of(2))
    assert alive == [3] * 5 + [2] * 5 + [1] * 5 + [0] * 5
