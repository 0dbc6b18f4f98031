"""Backends for GPUs: on one, against the oracle; anywhere, what they say where they cannot compute."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from services.engine.attention.backend import AttentionBackend, BackendUnavailable
from services.engine.attention.factory import BACKENDS
from services.engine.attention.flash_attn import FlashAttnAttention
from services.engine.attention.flash_attn_3 import FlashAttn3Attention
from services.engine.attention.flashinfer import FlashInferAttention, page_lists
from services.engine.attention.paged_metadata import MetadataOfBatch, check_flash_pool
from services.engine.attention.stored import FLOAT8, FLOAT8_CAPABILITY
from services.engine.attention.torch_varlen import TorchVarlenAttention
from services.engine.attention.triton_paged import TritonPagedAttention
from services.engine.attention.triton_prefill import TritonPrefillAttention, tiles_of
from services.engine.batch import ForwardBatch
from tests.engine.attention.gpu_backends import SHAPES, check_mixed, check_problem
from tests.engine.attention.test_conformance import FORMS

# Library, backend, page sizes.
GPU_BACKENDS: dict[str, tuple[str, Callable[[Tensor], AttentionBackend], tuple[int, ...]]] = {
    "flash_attn": ("flash_attn", FlashAttnAttention, (256, 512)),
    "flash_attn_3": ("flash_attn_interface", FlashAttn3Attention, (1, 16, 256)),
    "torch_varlen": ("torch", TorchVarlenAttention, (256, 512)),
    "flashinfer": ("flashinfer", FlashInferAttention, (1, 16, 256)),
    "triton_paged": ("triton", TritonPagedAttention, (1, 16, 256)),
    "triton_prefill": ("triton", TritonPrefillAttention, (1, 16, 256)),
}
CASES = [(name, page_size) for name, (_, _, sizes) in GPU_BACKENDS.items() for page_size in sizes]

on_a_gpu = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def backend(name: str) -> Callable[[Tensor], AttentionBackend]:
    library, make, _ = GPU_BACKENDS[name]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    return make


class TestOnAGpu:
    pytestmark = on_a_gpu

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize(("name", "page_size"), CASES)
    def test_two_long_sequences(self, name: str, page_size: int, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        check_problem(backend(name), "cuda", dtype, page_size, shape)

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize(("name", "page_size"), [case for case in CASES if case[1] <= 256])
    def test_mixed_batch(self, name: str, page_size: int, form: str) -> None:
        check_mixed(backend(name), "cuda", torch.bfloat16, page_size, form)

    @pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < FLOAT8_CAPABILITY, reason="needs 8.9"
    )
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("name", ["flashinfer", "triton_paged", "triton_prefill"])
    def test_kv_of_eight_bits(self, name: str, dtype: torch.dtype) -> None:
        for shape in SHAPES:
            check_problem(backend(name), "cuda", dtype, 16, shape, FLOAT8)
        check_mixed(backend(name), "cuda", dtype, 16, "all", FLOAT8)


def batch() -> ForwardBatch:
    """Three sequences over pages of 4 tokens."""
    ignored = torch.zeros(4, dtype=torch.int64)
    return ForwardBatch(
        token_ids=ignored,
        positions=ignored,
        slots=ignored,
        query_starts=torch.tensor([0, 1, 3, 4], dtype=torch.int32),
        context_lengths=torch.tensor([9, 4, 1], dtype=torch.int32),
        block_tables=torch.tensor([[7, 2, 5], [3, -1, -1], [8, -1, -1]], dtype=torch.int32),
        logits_rows=ignored,
    )


def test_pages_as_a_list() -> None:
    starts, indices, last = page_lists(batch(), 4)
    assert (starts.tolist(), indices.tolist(), last.tolist()) == ([0, 3, 4, 5], [7, 2, 5, 3, 8], [1, 4, 1])
    assert {starts.dtype, indices.dtype, last.dtype} == {torch.int32}


def test_metadata_is_computed_once_a_batch() -> None:
    metadata, first = MetadataOfBatch(torch.device("cpu")), batch()
    known = metadata.of(first)
    assert known.context_starts.tolist() == [0, 9, 13, 14]
    assert (known.most_rows, known.longest) == (2, 9)
    assert metadata.of(first) is known
    assert metadata.of(batch()) is not known


def test_rows_in_tiles_those_that_see_most_first() -> None:
    ignored = torch.zeros(13, dtype=torch.int64)
    several = ForwardBatch(
        token_ids=ignored,
        positions=ignored,
        slots=ignored,
        query_starts=torch.tensor([0, 5, 6, 13], dtype=torch.int32),
        context_lengths=torch.tensor([25, 9, 7], dtype=torch.int32),
        block_tables=torch.zeros(3, 1, dtype=torch.int32),
        logits_rows=ignored,
    )
    tiles = tiles_of(several, (0, 2), most_rows=3)
    assert tiles.tolist() == [[0, 3, 2, 23], [0, 0, 3, 20], [2, 12, 1, 6], [2, 9, 3, 3], [2, 6, 3, 0]]
    assert tiles.dtype == torch.int32


@pytest.mark.usefixtures("not_interpreted")
@pytest.mark.parametrize("name", GPU_BACKENDS)
def test_without_a_gpu_each_says_why_it_cannot_be_used(name: str) -> None:
    kv = torch.zeros(1, 2, 2, 2, 256, 64, dtype=torch.bfloat16)
    with pytest.raises(BackendUnavailable, match=r"not installed|on a GPU|of torch 2\.11\S* has no block_table"):
        BACKENDS[name](kv, 1)


def test_pages_that_flash_attention_cannot_read_are_refused() -> None:
    kv = torch.zeros(1, 2, 2, 2, 16, 64, dtype=torch.bfloat16, device="meta")
    with pytest.raises(BackendUnavailable, match="on a GPU, not on meta"):
        check_flash_pool(kv, page_multiple=256)
