"""Triton's kernels are interpreted where there is no GPU to compile them for."""

from __future__ import annotations

import os

import pytest
import torch

# Triton looks at this once, when it is first imported, which transformers may do long before a kernel is wanted.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def interpreted() -> None:
    """For tests of kernels on the CPU."""
    if torch.cuda.is_available():
        pytest.skip("no GPU is wanted here: kernels that were compiled cannot be interpreted")
    pytest.importorskip("triton", reason="triton is not installed")
