"""Fused operations in Triton's interpreter on the CPU; on a GPU in test_ops_choice.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from services.engine.attention.gather_sdpa import GatherSdpaAttention
from services.engine.attention.stored import FLOAT8
from services.engine.batch import ForwardBatch
from services.engine.model import decoder
from services.engine.model.config import ModelConfig
from services.engine.model.decoder import Decoder
from services.engine.model.loader import LoadedModel, load_model
from services.engine.model.ops import Step, TorchOps
from services.engine.model.ops_choice import check_ops, fused_ops
from services.engine.model.rope import RotaryTable
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
    check_ops(fused_ops(config), config, CPU, dtype, dtype)
    check_ops(fused_ops(config), config, CPU, dtype, FLOAT8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("variant", ["llama, wide heads", "qwen3, window and biases", "gemma2", "gemma3, stretched"])
def test_a_family_equals_plain_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    """Prompts, a piece beside decoding, and decoding: the same logits, and KV in the same slots and in no other."""
    save_random(tmp_path, *VARIANTS[variant])
    runners = []
    for make in (lambda config, *_: TorchOps(config), lambda config, *_: fused_ops(config)):
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


def test_keys_and_values_become_the_same_floats_of_eight_bits(tiny: LoadedModel) -> None:
    """At position 0 nothing turns: what is stored is what came, rounded. Halves of a head turn together, so NaN, which
    would spread to its other half, comes in pairs."""
    config = config_of(tiny, SHAPES[0])
    half = config.head_dim // 2
    numbers = torch.tensor(
        [0.0, -0.0, 1.0, 1.0625, 1.1875, -3.3, 448.0, 455.9, 464.0, 465.0, 1e4, -1e30, 3e38, 2**-9, 2**-10, -(2**-11),
         0.0146, torch.nan]
    )  # fmt: skip
    heads = config.num_heads + 2 * config.num_kv_heads
    projected = numbers[:, None, None].expand(-1, heads, 2 * half).reshape(len(numbers), -1).contiguous()
    at = torch.zeros(len(numbers), dtype=torch.int64)
    slots = torch.arange(len(numbers)) + 3
    batch = ForwardBatch(at, at, slots, at, at, at, at)
    table = RotaryTable(config.layers[0].rope, config.head_dim, 1, CPU)
    pools = [torch.zeros(1, 2, 2, config.num_kv_heads, 16, config.head_dim, dtype=FLOAT8) for _ in range(2)]
    for ops, pool in zip((TorchOps(config), fused_ops(config)), pools, strict=True):
        ops.rotate_and_store(Step(batch, GatherSdpaAttention(pool)), 0, projected, None, table)
    plain, fused = (pool.float() for pool in pools)
    torch.testing.assert_close(fused, plain, rtol=0, atol=0, equal_nan=True)
    stored = fused[0, slots // 16, :, :, slots % 16][:, 0, 0, 0]
    assert stored[6:15].tolist() == [448.0, 448.0, 448.0, 448.0, 448.0, -448.0, 448.0, 2**-9, 0.0]
    assert stored.isnan().tolist() == [False] * 17 + [True]


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
