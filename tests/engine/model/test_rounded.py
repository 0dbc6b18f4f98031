"""Weights of eight bits on a GPU: plain torch against exact weights, the kernel against plain torch."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from services.engine.attention.problem import WrongResult
from services.engine.model.linear.linear import DenseLinear, Linear, LinearMaker
from services.engine.model.linear.rounded import Rounded, RoundedLinear, rounded
from services.engine.model.linear.rounded_choice import Make, check, choose, kernel_layers, rounded_maker
from services.engine.model.loader import load_model
from tests.engine.model.running import RELATIVE_ERROR, PagedRunner, PagedSequence, random_tokens, relative_error
from tests.models import make_tiny_llama

CPU = torch.device("cpu")
# Half of the last bit, of the largest number of an output and of each number.
ERRORS = {torch.int8: 0.5 / 127, torch.float8_e4m3fn: 2**-4}
KINDS = pytest.mark.parametrize("kind", ERRORS, ids=["int8", "fp8"])


class ForgetsTheBias(RoundedLinear):
    def __init__(self, weight: Rounded, bias: Tensor | None = None) -> None:
        super().__init__(weight)


class ForgetsARow(RoundedLinear):
    def __call__(self, rows: Tensor) -> Tensor:
        right = super().__call__(rows)
        result = torch.empty_like(right)
        result[1:] = right[1:]
        return result


@KINDS
def test_weights_are_rounded_to_the_nearest_number(kind: torch.dtype) -> None:
    weight = torch.randn(9, 50, generator=torch.Generator().manual_seed(1))
    weight[3] = 0
    made = rounded(weight, kind)
    back = made.numbers.float() * made.scales[:, None]
    largest = weight.abs().amax(1, keepdim=True) if kind == torch.int8 else weight.abs() + made.scales[:, None] * 2**-6
    assert ((back - weight).abs() <= largest * ERRORS[kind] * 1.0001).all()
    assert (back.abs().amax(1) - weight.abs().amax(1)).abs().max() < 1e-6, "the largest number of an output is kept"


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nothing_is_lost_but_by_rounding(kind: torch.dtype, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(2)
    weight = rounded(torch.randn(33, 70, generator=random), kind)
    bias, rows = torch.randn(33, generator=random).to(dtype), torch.randn(5, 70, generator=random).to(dtype)
    exact = rows.double() @ (weight.numbers.double() * weight.scales.double()[:, None]).T + bias.double()
    result = RoundedLinear(weight, bias)(rows)
    assert result.dtype == dtype
    assert (result.double() - exact).abs().max() <= 3 * torch.finfo(dtype).eps * exact.abs().max()


@KINDS
def test_a_model_computes_with_the_rounded_weights_and_has_another_digest(tmp_path: Path, kind: torch.dtype) -> None:
    folder = make_tiny_llama(tmp_path)

    def dense(weight: Tensor, bias: Tensor | None) -> Linear:
        made = rounded(weight, kind)
        return DenseLinear(made.numbers.float() * made.scales[:, None], bias)

    makers = (LinearMaker(dense), rounded_maker(CPU, torch.float32, kind, "name"))
    plain, kept = (load_model(folder, device=CPU, dtype=torch.float32, linear=maker) for maker in makers)
    logits = []
    for loaded in (plain, kept):
        sequence = PagedSequence(random_tokens(60, loaded.config.vocab_size, 3))
        logits += PagedRunner(loaded.model, "gather_sdpa").step([(sequence, 60)])
    assert relative_error(logits[1], logits[0]) < RELATIVE_ERROR
    assert plain.digest != kept.digest, "KV of other weights is not to be mixed"


@pytest.mark.parametrize("wrong", [ForgetsTheBias, ForgetsARow])
def test_a_wrong_kernel_is_found_and_not_taken(wrong: Make, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(WrongResult):
        check(wrong, CPU, torch.float32, torch.int8)
    caplog.set_level(logging.WARNING)
    assert choose(CPU, torch.float32, torch.int8, lambda: wrong) is RoundedLinear
    assert caplog.messages == ["rounded weights are multiplied by plain torch"]


def test_a_right_one_is_taken() -> None:
    class Right(RoundedLinear):
        pass

    made: Linear = choose(CPU, torch.float32, torch.int8, lambda: Right)(rounded(torch.ones(2, 3), torch.int8), None)
    assert isinstance(made, Right)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter multiplies the bits of bfloat16
def test_the_kernel_in_the_interpreter(kind: torch.dtype, dtype: torch.dtype) -> None:
    check(kernel_layers(), CPU, dtype, kind)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_kernel_on_a_gpu(kind: torch.dtype, dtype: torch.dtype) -> None:
    if kind == torch.float8_e4m3fn and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no floats of eight bits")
    check(kernel_layers(), torch.device("cuda", torch.cuda.current_device()), dtype, kind)
