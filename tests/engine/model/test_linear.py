"""Linear layers on the CPU: equal to their plain twins, and a row's bits do not depend on anything beside it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from services.engine.kernels.jobs import Jobs
from services.engine.kernels.team import team_of
from services.engine.model.linear import trial
from services.engine.model.linear.block_linear import BlockLinear
from services.engine.model.linear.blocks import BLOCK, Blocks, blocks_of, stacked
from services.engine.model.linear.factory import linear_maker
from services.engine.model.linear.form import WeightForm
from services.engine.model.linear.linear import DENSE, DenseLinear, Linear
from services.engine.model.linear.tiled import SPLITS, BatchSize, Tiled, TiledLinear

# (in, out): whole tiles; a remainder of panels; odd everything; less than a block; a head
SHAPES = [(64, 48), (576, 960), (100, 37), (7, 1), (128, 1000)]
ROWS = 37
LARGEST = {1: 127, 2: 127 * 256 + 127}  # number that a row is rounded to, by its bytes


def _random(depth: int) -> torch.Generator:
    return torch.Generator().manual_seed(depth)


def _bytes(depth: int, columns: int) -> Blocks:
    return blocks_of(torch.randn(columns, depth, generator=_random(depth)))


def _nibbles(depth: int, columns: int) -> Blocks:
    """Blocks as a GGUF file has them, numbers of every size."""
    random, num_blocks = _random(depth), -(-depth // BLOCK)
    numbers = torch.randint(0, 256, (columns, num_blocks, BLOCK // 2), dtype=torch.uint8, generator=random)
    scales = torch.rand(columns, num_blocks, generator=random).to(torch.float16)
    minimums = torch.randn(columns, num_blocks, generator=random).to(torch.float16)
    return Blocks(depth, numbers, scales, minimums)


BLOCKS = [_bytes, _nibbles]
MakeBlocks = Callable[[int, int], Blocks]
MakeLayer = Callable[[int, int, int], Linear]


def _float32_layer(depth: int, columns: int, threads: int = 1) -> Linear:
    random = _random(depth)
    weight = torch.randn(columns, depth, generator=random)
    return TiledLinear(weight, torch.randn(columns, generator=random), team_of(threads))


def _block_layer(make: MakeBlocks, activation_bytes: int) -> MakeLayer:
    def layer(depth: int, columns: int, threads: int = 1) -> Linear:
        bias = torch.randn(columns, generator=_random(1)) if make is _bytes else None
        return BlockLinear(make(depth, columns), bias, team_of(threads), activation_bytes)

    return layer


LAYERS = [_float32_layer, *(_block_layer(make, activation_bytes) for make in BLOCKS for activation_bytes in (1, 2))]


def _rows(depth: int, count: int = ROWS) -> Tensor:
    rows = torch.randn(count, depth, generator=torch.Generator().manual_seed(1))
    rows[:, depth // 2] *= 50  # a column of outliers, as models have
    rows[3] *= 1000
    rows[4] = 0
    return rows


def plain_block_linear(blocks: Blocks, rows: Tensor, activation_bytes: int) -> Tensor:
    """The twin of BlockLinear in float64: rows rounded, 32 with a scale, times the values of the blocks."""
    grouped = F.pad(rows, (0, -rows.shape[1] % BLOCK)).view(rows.shape[0], -1, BLOCK)
    scales = grouped.abs().amax(-1, keepdim=True) / LARGEST[activation_bytes]
    rounded = (grouped / scales.clamp_min(1e-30)).round().double() * scales.double()
    return rounded.flatten(1)[:, : rows.shape[1]] @ blocks.values().double().T


@pytest.mark.parametrize(("depth", "columns"), SHAPES)
def test_float32_equals_torch(depth: int, columns: int) -> None:
    random = torch.Generator().manual_seed(depth)
    weight, bias = torch.randn(columns, depth, generator=random), torch.randn(columns, generator=random)
    expected = DenseLinear(weight.double(), bias.double())(_rows(depth).double())
    actual = TiledLinear(weight, bias, team_of(1))(_rows(depth))
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=2e-5 * float(expected.abs().max()) / 100)
    assert actual.is_contiguous()


@pytest.mark.parametrize("activation_bytes", LARGEST)
@pytest.mark.parametrize("make", BLOCKS)
@pytest.mark.parametrize(("depth", "columns"), SHAPES)
def test_blocks_equal_their_plain_twin(make: MakeBlocks, depth: int, columns: int, activation_bytes: int) -> None:
    blocks, rows = make(depth, columns), _rows(depth)
    bias = torch.randn(columns, generator=_random(2))
    expected = plain_block_linear(blocks, rows, activation_bytes) + bias
    actual = BlockLinear(blocks, bias, team_of(1), activation_bytes)(rows).double()
    # A value that lies between two numbers may be rounded to either, a step of one group's scale apart.
    error = (actual - expected).abs().amax(1) / expected.abs().amax(1)
    assert error.max() < (2e-3 if activation_bytes == 1 else 5e-5)
    assert error.median() < 1e-5


@pytest.mark.parametrize("make", BLOCKS)
@pytest.mark.parametrize(("depth", "columns"), SHAPES)
def test_activations_of_two_bytes_lose_next_to_nothing(make: MakeBlocks, depth: int, columns: int) -> None:
    blocks, rows = make(depth, columns), _rows(depth)
    exact = rows.double() @ blocks.values().double().T
    actual = BlockLinear(blocks, None, team_of(1), 2)(rows).double()
    # Half a step of each group's scale, times its weights, is the most that rounding can do; then float32's own sums.
    grouped = F.pad(rows, (0, -depth % BLOCK)).view(ROWS, -1, BLOCK).double()
    half_steps = (grouped.abs().amax(-1, keepdim=True) / LARGEST[2] / 2).expand_as(grouped).flatten(1)[:, :depth]
    magnitudes = blocks.values().abs().double().T
    bound = half_steps @ magnitudes + 1e-5 * (rows.abs().double() @ magnitudes)
    assert ((actual - exact).abs() <= bound).all()
    error = (actual - exact).norm(dim=1) / exact.norm(dim=1).clamp_min(1e-30)
    assert error.median() < 1e-4  # of one byte it is 2e-3 to 1e-2


@pytest.mark.parametrize("activation_bytes", LARGEST)
@pytest.mark.parametrize("make", BLOCKS)
def test_sums_of_the_largest_numbers_are_exact(make: MakeBlocks, activation_bytes: int) -> None:
    blocks = make(64, 48)
    largest = 127 if blocks.minimums is None else 255  # 255 is two nibbles of 15
    blocks = dataclasses.replace(blocks, numbers=torch.full_like(blocks.numbers, largest))
    for sign in (1, -1):
        rows = torch.full((3, 64), float(sign * LARGEST[activation_bytes]))
        actual = BlockLinear(blocks, None, team_of(1), activation_bytes)(rows)
        torch.testing.assert_close(actual.double(), rows.double() @ blocks.values().double().T, rtol=1e-6, atol=0)


@pytest.mark.parametrize("activation_bytes", LARGEST)
@pytest.mark.parametrize("make", BLOCKS)
@pytest.mark.parametrize("size", [1e-45, 1e-38, 2.0**-101, 2.0**-99, 1e-20, 1e30])
def test_rows_of_any_size_are_rounded(make: MakeBlocks, activation_bytes: int, size: float) -> None:
    blocks = make(64, 48)
    rows = size * torch.randn(3, 64, generator=_random(64)).sign()
    actual = BlockLinear(blocks, None, team_of(1), activation_bytes)(rows)
    assert actual.isfinite().all()
    expected = plain_block_linear(blocks, rows, activation_bytes)
    # Below 2**-100 a group counts as zero.
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-26 + 1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(("depth", "columns"), SHAPES)
def test_bytes_are_close_to_float32(depth: int, columns: int) -> None:
    weight = torch.randn(columns, depth, generator=_random(depth))
    rows = torch.randn(ROWS, depth, generator=_random(depth + 1))
    exact = rows @ weight.T
    error = (BlockLinear(blocks_of(weight), None, team_of(1), 1)(rows) - exact).norm() / exact.norm()
    assert error < 0.02


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize(("depth", "columns"), SHAPES)
def test_bits_of_a_row_are_its_own(make: MakeLayer, depth: int, columns: int) -> None:
    layer, rows = make(depth, columns, 1), _rows(depth)
    together = layer(rows)
    for count in (1, 2, 3, 4, 5, 7, 8, 9, 16):
        for start in range(0, ROWS - count, count):
            assert torch.equal(layer(rows[start : start + count]), together[start : start + count])
    assert torch.equal(layer(rows.flip(0)).flip(0), together)


@pytest.mark.parametrize("make", LAYERS)
def test_bits_do_not_depend_on_threads(make: MakeLayer) -> None:
    rows = _rows(576)
    alone = make(576, 960, 1)(rows)
    for threads in (2, 3):
        assert torch.equal(make(576, 960, threads)(rows), alone)


@pytest.mark.parametrize("make", LAYERS)
def test_bits_do_not_depend_on_the_split(make: MakeLayer) -> None:
    layer, rows = make(576, 960, 2), _rows(576)
    assert isinstance(layer, Tiled)
    expected = layer(rows), layer(rows[:1])
    for split in SPLITS:
        for size in BatchSize:
            layer.split(size, split)
        assert torch.equal(layer(rows), expected[0])
        assert torch.equal(layer(rows[:1]), expected[1])


def test_splits_are_tried_for_every_shape(caplog: pytest.LogCaptureFixture) -> None:
    maker = linear_maker(torch.device("cpu"), torch.float32, 2, WeightForm.BYTES)
    layers = [maker.make(torch.randn(columns, 64, generator=_random(0)), None) for columns in (960, 960, 480)]
    rows = _rows(64)
    before = [layer(rows) for layer in layers]
    with caplog.at_level("INFO", logger="services.engine.model.linear.trial"):
        maker.settle()
    fields = [record.__dict__["fields"] for record in caplog.records]
    assert {(each["out"], each["rows"]) for each in fields} == {(960, 1), (960, 16), (480, 1), (480, 16)}
    assert all(each["jobs_a_thread"] in SPLITS and each["4_ms"] > 0 for each in fields)
    assert all(torch.equal(layer(rows), value) for layer, value in zip(layers, before, strict=True))


def test_a_trial_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on by a millisecond whenever it is looked at."""
    maker = linear_maker(torch.device("cpu"), torch.float32, 2, WeightForm.BYTES)
    shapes = (960, 480, 96)
    for columns in shapes:
        maker.make(torch.ones(columns, 64), None)
    looks = itertools.count()
    monkeypatch.setattr(trial, "time", SimpleNamespace(perf_counter=lambda: next(looks) / 1000))
    maker.settle()
    a_round = (2 * len(SPLITS) + 2) / 1000  # one that was begun is finished
    assert 0 < next(looks) / 1000 <= 0.3 + len(shapes) * len(BatchSize) * a_round


def test_weights_are_rounded_by_blocks() -> None:
    weight = torch.zeros(2, BLOCK + 1)
    weight[0, 0], weight[0, BLOCK], weight[1, 3] = 127.0, 1e-3, -2.0
    blocks = blocks_of(weight)
    assert (blocks.numbers.shape, blocks.scales.shape) == ((2, 2, BLOCK), (2, 2))
    assert (blocks.numbers[0, 0, 0], blocks.numbers[0, 1, 0], blocks.numbers[1, 0, 3]) == (127, 127, -127)
    torch.testing.assert_close(blocks.values(), weight, rtol=1e-3, atol=0)


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e30])
def test_weights_of_any_size_are_rounded_alike(size: float) -> None:
    weight = torch.randn(48, 64, generator=_random(0)) * size
    error = (blocks_of(weight).values() - weight).abs().max() / weight.abs().max()
    assert error < 0.5 / 127 * 1.01
    assert torch.equal(blocks_of(torch.zeros(3, 40)).values(), torch.zeros(3, 40))


def test_parts_of_blocks() -> None:
    blocks = _nibbles(128, 10)
    assert torch.equal(blocks.part(slice(2, 5)).values(), blocks.values()[2:5])
    assert torch.equal(blocks.inputs(slice(32, 96)).values(), blocks.values()[:, 32:96])
    assert torch.equal(stacked([blocks.part(slice(0, 4)), blocks.part(slice(4, 10))]).values(), blocks.values())


def test_kinds_by_device_and_dtype() -> None:
    weight, cpu = torch.ones(16, 64), torch.device("cpu")
    assert linear_maker(cpu, torch.bfloat16, 1, WeightForm.EXACT) is DENSE
    assert linear_maker(torch.device("cuda"), torch.float32, 1, WeightForm.EXACT) is DENSE
    forms = (WeightForm.EXACT, WeightForm.BYTES, WeightForm.PACKED, WeightForm.PACKED_16)
    exact, rounded, packed, packed16 = (linear_maker(cpu, torch.float32, 1, form) for form in forms)
    assert isinstance(exact.make(weight, None), TiledLinear)
    assert isinstance(rounded.make(weight, None), BlockLinear)
    assert rounded.make_packed is None is exact.make_packed
    assert packed.make_packed is not None is not packed16.make_packed
    assert rounded.form == packed.form  # without blocks of a file they compute the same
    assert len({exact.form, packed.form, packed16.form}) == 3


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize(("depth", "columns", "threads"), [(64, 4000, 1), (100, 37, 2), (7, 1, 1), (64, 2304, 3)])
def test_the_largest_is_that_of_torch(make: MakeLayer, depth: int, columns: int, threads: int) -> None:
    """Of less than a panel, and of several chunks, whole and not."""
    layer = _without_bias(make(depth, columns, threads))
    for count in (1, 7, ROWS):
        rows = _rows(depth)[:count]
        assert torch.equal(_largest(layer, rows), layer(rows).argmax(-1))


@pytest.mark.parametrize("make", LAYERS)
def test_a_layer_with_a_bias_does_not_look_for_the_largest(make: MakeLayer) -> None:
    layer = make(64, 48, 1)
    assert isinstance(layer, Tiled)
    if layer._bias is not None:
        with pytest.raises(ValueError, match="bias"):
            layer.add_largest_to(Jobs(team_of(1)), _rows(64))


EQUALS = [(0, 1), (15, 16), (47, 48), (767, 768), (3998, 3999), (5, 16 + 5, 768 + 5), (3000, 700, 20)]
SPECIAL = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0]


@pytest.mark.parametrize("threads", [1, 2])
def test_of_equals_the_first_is_the_largest(threads: int) -> None:
    """Within vectors, panels and chunks and across them, each case a row."""
    values = torch.linspace(-3, -2, 4000).repeat(len(EQUALS), 1)
    for row, places in zip(values, EQUALS, strict=True):
        row[list(places)] = 5.0
    layer = TiledLinear(values.T.contiguous(), None, team_of(threads))
    assert _largest(layer, torch.eye(len(EQUALS))).tolist() == [min(places) for places in EQUALS]


@pytest.mark.parametrize("first", SPECIAL)
@pytest.mark.parametrize("second", SPECIAL)
def test_the_largest_of_what_is_no_number_is_that_of_torch(first: float, second: float) -> None:
    for places in ((3, 2000), (3990, 3), (3998, 3999), (16, 32)):
        values = torch.linspace(-3, -2, 4000)
        values[list(places)] = torch.tensor([first, second])
        layer = TiledLinear(values[:, None].contiguous(), None, team_of(2))
        assert _largest(layer, torch.ones(1, 1)).tolist() == [int(values.argmax())]


def _without_bias(layer: Linear) -> Tiled:
    assert isinstance(layer, Tiled)
    layer._bias = None
    return layer


def _largest(layer: Tiled, rows: Tensor) -> Tensor:
    jobs = Jobs(team_of(2))
    found = layer.add_largest_to(jobs, rows)
    jobs.run()
    return found
