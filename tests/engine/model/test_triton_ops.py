"""Fused operations in Triton's interpreter on the CPU; on a GPU in test_ops_choice.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from services.engine.model import decoder
from services.engine.model.config import ModelConfig
from services.engine.model.decoder import Decoder
from services.engine.model.loader import LoadedModel, load_model
from services.engine.model.ops import TorchOps
from services.engine.model.ops_choice import check_ops, fused_ops
from tests.engine.model.ops_shapes import SHAPES, Shape, config_of
from tests.engine.model.random_models import VARIANTS, save_random
from tests.engine.model.running import RELATIVE_ERROR, PagedRunner, PagedSequence, random_tokens, relative_error

# numpy, which interprets kernels, tells of an infinite exponential; the sigmoid over it is 0, as it should be.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("interpreted"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
]

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_self_test_of_a_start(tiny: LoadedModel, shape: Shape, dtype: torch.dtype) -> None:
    config = config_of(tiny, shape)
    check_ops(fused_ops(config), config, CPU, dtype)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("variant", ["llama, wide heads", "qwen3, window and biases", "gemma2", "gemma3, stretched"])
def test_a_family_equals_plain_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    """Prompts, a piece beside decoding, and decoding: the same logits, and KV in the same slots and in no other."""
    save_random(tmp_path, *VARIANTS[variant])
    runners = []
    for make in (lambda config, device, dtype: TorchOps(config), lambda config, device, dtype: fused_ops(config)):
        monkeypatch.setattr(decoder, "make_ops", make)
        model = load_model(tmp_path, device=CPU, dtype=torch.float32).model
        assert isinstance(model, Decoder)
        runners.append(PagedRunner(model, "gather_sdpa"))
    written: list[list[int]] = [[] for _ in runners]
    works = [[PagedSequence(random_tokens(90, 300, seed)) for seed in range(2)] for _ in runners]
    for counts in ((50, 1), (1, 17), (1, 1)):
        expected, actual = (
            runner.step(list(zip(work, counts, strict=True)), layers.append)
            for runner, work, layers in zip(runners, works, written, strict=True)
        )
        for one, other in zip(actual, expected, strict=True):
            assert relative_error(one, other) < RELATIVE_ERROR, counts
    plain, fused = (runner.kv for runner in runners)
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert written[0] == written[1] == list(range(len(plain))) * 3


def test_rows_of_any_strides(tiny: LoadedModel) -> None:
    """Every other element of a wider matrix, and columns of a transposed one."""
    config = config_of(tiny, SHAPES[0])
    plain, fused, random = TorchOps(config), fused_ops(config), torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=random)

    weight = matrix(1, 48)[0]
    hidden, added = matrix(9, 96)[1::2, ::2], matrix(48, 4).T
    expected = hidden.clone()
    torch.testing.assert_close(fused.norm(added, weight), plain.norm(added, weight))
    torch.testing.assert_close(fused.add_norm(hidden, added, weight), plain.add_norm(expected, added, weight))
    assert torch.equal(hidden, expected)
    for gate_up in (matrix(4, 320)[:, ::2], matrix(160, 3).T):
        torch.testing.assert_close(fused.activate(gate_up), plain.activate(gate_up))


def test_a_row_does_not_depend_on_the_others(tiny: LoadedModel) -> None:
    config = config_of(tiny, SHAPES[1])
    fused, rows = fused_ops(config), torch.randn(7, 2200, generator=torch.Generator().manual_seed(0))
    weight = torch.ones(640)
    assert torch.equal(fused.activate(rows)[2:3], fused.activate(rows[2:3]))
    assert torch.equal(fused.norm(rows[:, :640], weight)[2:3], fused.norm(rows[2:3, :640], weight))


def test_no_rows(tiny: LoadedModel) -> None:
    assert isinstance(tiny.config, ModelConfig)
    size = tiny.config.hidden_size
    assert fused_ops(tiny.config).norm(torch.ones(0, size), torch.ones(size)).shape == (0, size)
