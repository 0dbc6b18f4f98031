"""Linear layers on the CPU: equal to their plain twins, and a row's bits do not depend on anything beside it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from services.engine.kernels.team import team_of
from services.engine.kernels.tiles import GROUP
from services.engine.model.linear.factory import linear_maker
from services.engine.model.linear.linear import DENSE, DenseLinear, Linear
from services.engine.model.linear.tiled import ByteLinear, TiledLinear, quantise_weight

# (in, out): whole tiles; a remainder of panels; odd everything; less than a group; a head
SHAPES = [(64, 48), (576, 960), (100, 37), (7, 1), (128, 1000)]
ROWS = 37


def _layer(kind: type[TiledLinear] | type[ByteLinear], depth: int, columns: int, threads: int = 1) -> Linear:
    random = torch.Generator().manual_seed(depth)
    weight = torch.randn(columns, depth, generator=random)
    return kind(weight, torch.randn(columns, generator=random), team_of(threads))


def _rows(depth: int, count: int = ROWS) -> Tensor:
    rows = torch.randn(count, depth, generator=torch.Generator().manual_seed(1))
    rows[:, depth // 2] *= 50  # a column of outliers, as models have
    rows[3] *= 1000
    rows[4] = 0
    return rows


def plain_byte_linear(weight: Tensor, bias: Tensor, rows: Tensor) -> Tensor:
    """The twin of ByteLinear in float64: bytes of both sides, multiplied group by group."""

    def restored(values: Tensor) -> Tensor:
        quantised, scales = quantise_weight(values)
        return (quantised.double() * scales.double()[..., None]).flatten(1)[:, : values.shape[1]]

    return restored(rows) @ restored(weight).T + bias


@pytest.mark.parametrize(("depth", "columns"), SHAPES)
def test_float32_equals_torch(depth: int, columns: int) -> None:
    random = torch.Generator().manual_seed(depth)
    weight, bias = torch.randn(columns, depth, generator=random), torch.randn(columns, generator=random)
    expected = DenseLinear(weight.double(), bias.double())(_rows(depth).double())
    actual = TiledLinear(weight, bias, team_of(1))(_rows(depth))
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=2e-5 * float(expected.abs().max()) / 100)
    assert actual.is_contiguous()


@pytest.mark.parametrize(("depth", "columns"), SHAPES)
def test_bytes_equal_their_plain_twin(depth: int, columns: int) -> None:
    random = torch.Generator().manual_seed(depth)
    weight, bias = torch.randn(columns, depth, generator=random), torch.randn(columns, generator=random)
    rows = _rows(depth)
    expected = plain_byte_linear(weight, bias, rows)
    actual = ByteLinear(weight, bias, team_of(1))(rows).double()
    # A value that lies between two bytes may be rounded to either: at most half a step of one group's scale.
    error = (actual - expected).abs().amax(1) / expected.abs().amax(1)
    assert error.max() < 2e-3
    assert error.median() < 1e-5


@pytest.mark.parametrize(("depth", "columns"), SHAPES)
def test_bytes_are_close_to_float32(depth: int, columns: int) -> None:
    random = torch.Generator().manual_seed(depth)
    weight = torch.randn(columns, depth, generator=random)
    rows = torch.randn(ROWS, depth, generator=random)
    exact = rows @ weight.T
    error = (ByteLinear(weight, None, team_of(1))(rows) - exact).norm() / exact.norm()
    assert error < 0.02


@pytest.mark.parametrize("kind", [TiledLinear, ByteLinear])
@pytest.mark.parametrize(("depth", "columns"), SHAPES)
def test_bits_of_a_row_are_its_own(kind: type[TiledLinear] | type[ByteLinear], depth: int, columns: int) -> None:
    layer, rows = _layer(kind, depth, columns), _rows(depth)
    together = layer(rows)
    for count in (1, 2, 3, 4, 5, 7, 8, 9, 16):
        for start in range(0, ROWS - count, count):
            assert torch.equal(layer(rows[start : start + count]), together[start : start + count])
    assert torch.equal(layer(rows.flip(0)).flip(0), together)


@pytest.mark.parametrize("kind", [TiledLinear, ByteLinear])
def test_bits_do_not_depend_on_threads(kind: type[TiledLinear] | type[ByteLinear]) -> None:
    rows = _rows(576)
    alone = _layer(kind, 576, 960)(rows)
    for threads in (2, 3):
        assert torch.equal(_layer(kind, 576, 960, threads)(rows), alone)


def test_weights_are_quantised_by_groups() -> None:
    weight = torch.zeros(2, GROUP + 1)
    weight[0, 0], weight[0, GROUP], weight[1, 3] = 127.0, 1e-3, -2.0
    quantised, scales = quantise_weight(weight)
    assert (quantised.shape, scales.shape) == ((2, 2, GROUP), (2, 2))
    assert (quantised[0, 0, 0], quantised[0, 1, 0], quantised[1, 0, 3]) == (127, 127, -127)
    torch.testing.assert_close(scales, torch.tensor([[1.0, 1e-3 / 127], [2 / 127, 0.0]]))


def test_kinds_by_device_and_dtype() -> None:
    weight, cpu = torch.ones(16, 64), torch.device("cpu")
    assert linear_maker(cpu, torch.bfloat16, 1, False) is DENSE
    assert linear_maker(torch.device("cuda"), torch.float32, 1, False) is DENSE
    assert isinstance(linear_maker(cpu, torch.float32, 1, False).make(weight, None), TiledLinear)
    assert isinstance(linear_maker(cpu, torch.float32, 1, True).make(weight, None), ByteLinear)
    assert linear_maker(cpu, torch.float32, 1, False).form != linear_maker(cpu, torch.float32, 1, True).form
