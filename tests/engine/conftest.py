"""Triton's kernels are interpreted where there is no GPU to compile them for."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch

from tests.engine.float8 import convert_rightly

# Triton looks at this once, when it is first imported, which transformers may do long before a kernel is wanted.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def not_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without the setting. Kernels are made before: they would stay what they are made as."""
    with suppress(ImportError):
        importlib.import_module("services.engine.attention.triton_kernels")
        importlib.import_module("services.engine.attention.triton_prefill_kernels")
        importlib.import_module("services.engine.model.linear.rounded_kernels")
        importlib.import_module("services.engine.model.triton_ops_kernels")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture(scope="session")
def interpreted() -> Iterator[None]:
    """For tests of kernels on the CPU."""
    if torch.cuda.is_available():
        pytest.skip("no GPU is wanted here: kernels that were compiled cannot be interpreted")
    pytest.importorskip("triton", reason="triton is not installed")
    with pytest.MonkeyPatch.context() as patch:
        convert_rightly(patch)
        yield
