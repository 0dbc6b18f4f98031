"""KV of eight bits: what is stored of a number, and what plain torch makes of a pool of such numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from services.engine.attention.backend import AttentionBackend
from services.engine.attention.gather_sdpa import GatherSdpaAttention
from services.engine.attention.oracle import OracleAttention
from services.engine.attention.pages import PagedKv
from services.engine.attention.stored import FLOAT8, LARGEST, as_stored, fill_with_nan
from tests.engine.attention.gpu_backends import SHAPES, check_mixed, check_problem
from tests.engine.attention.test_conformance import FORMS

COMPUTED_IN = [torch.float32, torch.float16, torch.bfloat16]
ALL = torch.arange(256, dtype=torch.uint8).view(FLOAT8)


@pytest.mark.parametrize("dtype", COMPUTED_IN)
def test_every_number_of_eight_bits_is_read_and_stored_again_as_it_is(dtype: torch.dtype) -> None:
    numbers = ALL[~ALL.float().isnan()]
    assert len(numbers) == 254
    assert numbers.float().abs().max() == LARGEST
    assert torch.equal(as_stored(numbers.to(dtype), FLOAT8).view(torch.uint8), numbers.view(torch.uint8))
    assert torch.equal(numbers.to(dtype).double(), numbers.double())


@pytest.mark.parametrize("dtype", COMPUTED_IN)
def test_what_is_stored_is_the_nearest_number_and_never_nan(dtype: torch.dtype) -> None:
    values = (torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 300).to(dtype)
    assert values.abs().max() > 2 * LARGEST
    known = ALL.double()[~ALL.double().isnan()]
    nearest = (values.double()[:, None] - known).abs().amin(1)
    stored = as_stored(values, FLOAT8).double()
    assert torch.equal((values.double() - stored).abs(), nearest)


@pytest.mark.parametrize("dtype", COMPUTED_IN)
def test_the_largest_numbers_and_nan(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    values = torch.tensor([most, -most, 449.0, 470.0, -480.0, torch.inf, -torch.inf, torch.nan]).to(dtype)
    stored = as_stored(values, FLOAT8).float()
    assert stored[:7].tolist() == [448, -448, 448, 448, -448, 448, -448]
    assert stored[7].isnan()


@pytest.mark.parametrize("dtype", COMPUTED_IN)
def test_pools_of_other_types_keep_what_comes(dtype: torch.dtype) -> None:
    values = torch.tensor([1e4, torch.inf, torch.nan]).to(dtype)
    assert torch.equal(as_stored(values, dtype).isfinite(), torch.tensor([True, False, False]))


@pytest.mark.parametrize("heads", [slice(0, 4), slice(2, 4)], ids=["a pool", "heads of a pool"])
def test_slots_are_written_and_pages_read_and_filled_with_nan(heads: slice) -> None:
    """A rank of several has a strided part of the pool."""
    whole = torch.zeros(3, 6, 2, 4, 8, 10, dtype=FLOAT8)
    pool = PagedKv(whole[:, :, :, heads])
    num_heads = heads.stop - heads.start
    key, value = torch.randn(2, 3, num_heads, 10, generator=torch.Generator().manual_seed(1))
    pool.write(1, key, value, torch.tensor([5, 40, 13]))
    for token, (page, offset) in enumerate([(0, 5), (5, 0), (1, 5)]):
        for side, expected in enumerate((key, value)):
            assert torch.equal(whole[1, page, side, heads, offset].float(), expected[token].to(FLOAT8).float())
    assert int((whole.float() != 0).sum()) == int((torch.stack((key, value)).to(FLOAT8).float() != 0).sum())
    read = pool.read_pages(1, torch.tensor([[5, 1], [0, 0]]), torch.float32)
    assert read.shape == (2, 2, 2, num_heads, 8, 10)
    assert torch.equal(read, whole[1, :, :, heads].float()[torch.tensor([[5, 1], [0, 0]])])
    fill_with_nan(pool.kv, torch.tensor([1, 3]))
    is_nan = whole.float().isnan()
    assert is_nan[:, [1, 3], :, heads].all()
    assert int(is_nan.sum()) == 3 * 2 * 2 * num_heads * 8 * 10


@pytest.mark.parametrize("backend", [OracleAttention, GatherSdpaAttention])
class TestPlainTorch:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("page_size", [1, 16])
    def test_mixed_batch(self, backend: Callable[[Tensor], AttentionBackend], form: str, page_size: int) -> None:
        check_mixed(backend, "cpu", torch.float32, page_size, form, FLOAT8)

    @pytest.mark.parametrize("dtype", COMPUTED_IN)
    def test_two_long_sequences(self, backend: Callable[[Tensor], AttentionBackend], dtype: torch.dtype) -> None:
        check_problem(backend, "cpu", dtype, 16, SHAPES[0], FLOAT8)
