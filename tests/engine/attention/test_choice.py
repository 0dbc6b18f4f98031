"""Which backend an engine gets, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from services.engine.attention.factory import make_attention
from services.engine.attention.gather_sdpa import GatherSdpaAttention
from services.engine.attention.oracle import OracleAttention
from services.engine.attention.paged_numba import PagedNumbaAttention
from services.engine.attention.stored import FLOAT8
from services.engine.model.config import ModelConfig, load_config
from tests.models import make_tiny_llama


@pytest.fixture
def config(tmp_path: Path) -> ModelConfig:
    return load_config(make_tiny_llama(tmp_path))


def _pool(config: ModelConfig, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(config.num_layers, 3, 2, config.num_kv_heads, 16, config.head_dim, dtype=dtype)


def test_default_is_the_best_that_fits(config: ModelConfig) -> None:
    assert isinstance(make_attention(None, _pool(config), config), PagedNumbaAttention)
    assert isinstance(make_attention(None, _pool(config, torch.bfloat16), config), GatherSdpaAttention)
    assert isinstance(make_attention(None, _pool(config, FLOAT8), config, 1, torch.float32), GatherSdpaAttention)


def test_a_busy_moment_does_not_change_what_numbers_an_engine_computes(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's attention adds up in another order, so an answer that goes on there may go on with other tokens."""
    now_s, attend = [0.0], PagedNumbaAttention.attend
    monkeypatch.setattr("services.engine.attention.problem.time", SimpleNamespace(perf_counter=lambda: now_s[0]))

    def interrupted(self: PagedNumbaAttention, *arguments: Any) -> torch.Tensor:
        now_s[0] += 0.1
        return attend(self, *arguments)

    monkeypatch.setattr(PagedNumbaAttention, "attend", interrupted)
    assert isinstance(make_attention(None, _pool(config), config), PagedNumbaAttention)


def test_by_name(config: ModelConfig) -> None:
    assert isinstance(make_attention("oracle", _pool(config), config), OracleAttention)
    with pytest.raises(
        ValueError,
        match="unknown attention backend 'fast'; there are flash_attn, flash_attn_3, flashinfer, gather_sdpa",
    ):
        make_attention("fast", _pool(config), config)


def test_pools_that_do_not_fit_are_refused(config: ModelConfig) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        make_attention(None, _pool(config)[1:], config)
    for dtype in (torch.bfloat16, FLOAT8):
        with pytest.raises(ValueError, match=f"computes float32 on the CPU, not {dtype} on cpu"):
            make_attention("paged_numba", _pool(config, dtype), config)
