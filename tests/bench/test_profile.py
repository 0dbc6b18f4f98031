"""The profile of a step names a part for every kernel that runs in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.engine.profile import AROUND, PARTS, _plan, _profile
from services.engine.attention.factory import make_attention
from services.engine.core.runner import TorchRunner
from services.engine.model.linear.factory import linear_maker
from services.engine.model.linear.form import WeightForm
from services.engine.model.loader import load_model
from tests.models import make_tiny_llama


@pytest.mark.slow
@pytest.mark.parametrize(("sequences", "begin", "count"), [(1, 9, 1), (2, 9, 1), (1, 0, 20)])
def test_every_kernel_of_a_step_has_its_part(tmp_path: Path, sequences: int, begin: int, count: int) -> None:
    cpu = torch.device("cpu")
    linear = linear_maker(cpu, torch.float32, 1, WeightForm.PACKED)
    model = load_model(make_tiny_llama(tmp_path, vocab=1200), device=cpu, dtype=torch.float32, linear=linear).model
    config = model.config
    kv = torch.zeros(config.num_layers, 8, 2, config.num_kv_heads, 16, config.head_dim)
    runner = TorchRunner(model, make_attention("paged_numba", kv, config), kv)
    parts = _profile(runner, _plan(sequences, begin, count))
    assert parts.keys() == {*PARTS.values(), AROUND}
    assert all(parts[name] > 0 for name in set(PARTS.values()))
