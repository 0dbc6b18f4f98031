"""The Triton kernel's arithmetic, in Triton's interpreter on the CPU; on a GPU in test_gpu_backends.py."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from services.engine.attention.triton_paged import TritonPagedAttention
from tests.engine.attention.gpu_backends import SHAPES, check_mixed, check_problem
from tests.engine.attention.test_conformance import FORMS

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def interpreter() -> Iterator[None]:
    """Kernels of a module that is imported under this variable are interpreted from then on."""
    if torch.cuda.is_available():
        pytest.skip("no GPU is wanted here: kernels that were compiled cannot be interpreted")
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    pytest.importorskip("triton", reason="triton is not installed")
    yield
    if before is None:
        del os.environ["TRITON_INTERPRET"]
    else:
        os.environ["TRITON_INTERPRET"] = before


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("page_size", [1, 8, 16])
def test_mixed_batch(form: str, page_size: int) -> None:
    check_mixed(TritonPagedAttention, "cpu", torch.float32, page_size, form)


@pytest.mark.parametrize("shape", SHAPES[:2])
@pytest.mark.parametrize("page_size", [3, 16, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter multiplies the bits of bfloat16
def test_two_long_sequences(shape: tuple[int, ...], page_size: int, dtype: torch.dtype) -> None:
    check_problem(TritonPagedAttention, "cpu", dtype, page_size, shape)
