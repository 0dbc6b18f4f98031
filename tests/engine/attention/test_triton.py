"""The Triton kernel's arithmetic, in Triton's interpreter on the CPU; on a GPU in test_gpu_backends.py."""

from __future__ import annotations

from array import array
from pathlib import Path

import pytest
import torch

from services.engine.attention.gather_sdpa import GatherSdpaAttention
from services.engine.attention.stored import FLOAT8
from services.engine.attention.triton_paged import TritonPagedAttention
from services.engine.attention.triton_prefill import TritonPrefillAttention
from services.engine.core.plan import Segment
from services.engine.core.runner import make_batch
from services.engine.gpu.graphs import DecodeGraphs
from services.engine.gpu.inputs import StepInputs
from services.engine.gpu.packing import Packer
from services.engine.model.loader import load_model
from tests.engine.attention.gpu_backends import SHAPES, check_mixed, check_problem
from tests.engine.attention.test_conformance import FORMS
from tests.models import make_tiny_llama

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("interpreted")]


BACKENDS = [TritonPagedAttention, TritonPrefillAttention]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("page_size", [1, 8, 16])
def test_mixed_batch(backend: type[TritonPagedAttention], form: str, page_size: int) -> None:
    check_mixed(backend, "cpu", torch.float32, page_size, form)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES[:2])
@pytest.mark.parametrize("page_size", [3, 16, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter multiplies the bits of bfloat16
def test_two_long_sequences(
    backend: type[TritonPagedAttention], shape: tuple[int, ...], page_size: int, dtype: torch.dtype
) -> None:
    check_problem(backend, "cpu", dtype, page_size, shape)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("page_size", [1, 16])
def test_mixed_batch_over_kv_of_eight_bits(backend: type[TritonPagedAttention], form: str, page_size: int) -> None:
    check_mixed(backend, "cpu", torch.float32, page_size, form, FLOAT8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_two_long_sequences_over_kv_of_eight_bits(backend: type[TritonPagedAttention], dtype: torch.dtype) -> None:
    check_problem(backend, "cpu", dtype, 16, SHAPES[1], FLOAT8)


def test_a_captured_batch_is_read_from_device_memory_alone(tmp_path: Path) -> None:
    loaded = load_model(make_tiny_llama(tmp_path), device="cpu", dtype=torch.float32)
    model, page_size = loaded.model, 8
    kv = torch.randn(loaded.config.num_layers, 20, 2, loaded.config.num_kv_heads, page_size, loaded.config.head_dim)
    graphs = DecodeGraphs(model, TritonPagedAttention(kv), (1, 4), max_pages=16)
    segments = [Segment(n, begin, [7 + n], array("i", range(n, n + 5)), None) for n, begin in ((1, 33), (9, 36))]
    packer = Packer()
    batch = StepInputs(packer, segments, page_size, {}, pad_to=4).batch(packer.send(kv.device), torch.zeros(1).long())
    graphs.fill(batch)
    static = graphs.logits(graphs.static_batch(4))
    plain = make_batch(segments, page_size, kv.device)
    expected = model.logits(model.forward(plain, GatherSdpaAttention(kv)))
    assert (static[:2] - expected).abs().max() < 1e-3
    assert torch.equal(static[2:], static[:1].expand(2, -1)), "padding repeats the first row"
