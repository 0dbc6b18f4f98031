"""Which operations a decoder gets: fused ones that are right, and plain torch whatever is wrong with them."""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from services.engine.attention.gather_sdpa import GatherSdpaAttention
from services.engine.attention.problem import WrongResult
from services.engine.attention.stored import FLOAT8, FLOAT8_CAPABILITY
from services.engine.batch import ForwardBatch
from services.engine.model.config import ModelConfig
from services.engine.model.loader import LoadedModel, load_model
from services.engine.model.ops import Ops, Step, TorchOps
from services.engine.model.ops_choice import PAGE_SIZE, check_ops, choose_ops, fused_ops, make_ops
from services.engine.model.rope import RotaryTable
from tests.engine.model.ops_shapes import SHAPES, Shape, config_of
from tests.models import make_tiny_llama

CPU = torch.device("cpu")
on_a_gpu = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


class ForgetsARow(TorchOps):
    def norm(self, rows: Tensor, weight: Tensor) -> Tensor:
        result = torch.empty_like(rows)
        result[:-1] = super().norm(rows, weight)[:-1]
        return result


class KeepsTheOldSum(TorchOps):
    def add_norm(self, hidden: Tensor, added: Tensor | None, weight: Tensor) -> Tensor:
        return super().add_norm(hidden.clone(), added, weight)


class WritesElsewhere(TorchOps):
    def rotate_and_store(
        self, step: Step, layer: int, projected: Tensor, query_key_norm: Tensor | None, table: RotaryTable
    ) -> Tensor:
        query = super().rotate_and_store(step, layer, projected, query_key_norm, table)
        heads = projected.new_zeros(1, self._config.num_kv_heads, self._config.head_dim)
        step.attention.write(layer, heads, heads, torch.tensor([20]))
        return query


class TurnsTheOtherWay(TorchOps):
    def rotate_and_store(
        self, step: Step, layer: int, projected: Tensor, query_key_norm: Tensor | None, table: RotaryTable
    ) -> Tensor:
        table.sine.neg_()
        query = super().rotate_and_store(step, layer, projected, query_key_norm, table)
        table.sine.neg_()
        return query


class MixesGateAndUp(TorchOps):
    def activate(self, gate_up: Tensor) -> Tensor:
        return super().activate(gate_up.roll(gate_up.shape[1] // 2, 1))


class AnswersInFloat32(TorchOps):
    def activate(self, gate_up: Tensor) -> Tensor:
        return super().activate(gate_up).float()


class StoresAsItIs(TorchOps):
    """Rounds to floats of eight bits as torch 2.11 does: NaN comes of what is too large."""

    stored = staticmethod(lambda values: values.where(values.abs() < 464, torch.nan).to(FLOAT8))

    def rotate_and_store(
        self, step: Step, layer: int, projected: Tensor, query_key_norm: Tensor | None, table: RotaryTable
    ) -> Tensor:
        query = super().rotate_and_store(step, layer, projected, query_key_norm, table)
        assert isinstance(step.attention, GatherSdpaAttention)
        heads = projected.view(projected.shape[0], -1, self._config.head_dim)[:, -self._config.num_kv_heads :]
        pages, offsets = step.batch.slots // PAGE_SIZE, step.batch.slots % PAGE_SIZE
        values = step.attention.kv[layer, :, 1].view(torch.uint8)
        values[pages, :, offsets] = self.stored(heads).view(torch.uint8)
        return query


class StoresOtherNumbers(StoresAsItIs):
    stored = staticmethod(lambda values: values.clamp(-448, 448).to(torch.float8_e5m2))


class MakesNumbersOfNan(StoresAsItIs):
    stored = staticmethod(lambda values: values.nan_to_num(0).clamp(-448, 448).to(FLOAT8))


WRONG = {
    ForgetsARow: "norm: 48 of 240",
    KeepsTheOldSum: "sum: ",
    WritesElsewhere: "pages: ",
    TurnsTheOtherWay: "queries: ",
    MixesGateAndUp: "activation: ",
    AnswersInFloat32: "activation: ",
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_found_and_passed_over(
    tiny: LoadedModel, caplog: pytest.LogCaptureFixture, kind: type[TorchOps]
) -> None:
    config = config_of(tiny, SHAPES[0])
    with pytest.raises(WrongResult, match=WRONG[kind]):
        check_ops(kind(config), config, CPU, torch.bfloat16, torch.bfloat16)
    assert type(choose_ops(config, CPU, torch.bfloat16, torch.bfloat16, kind)) is TorchOps
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert WRONG[kind] in record.fields["why"]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (StoresAsItIs, "pages of large numbers: "),
        (StoresOtherNumbers, "pages: "),
        (MakesNumbersOfNan, "pages of large numbers: 8 of"),
    ],
)
def test_kv_that_is_stored_wrongly_in_eight_bits_is_found(tiny: LoadedModel, kind: type[TorchOps], words: str) -> None:
    config = config_of(tiny, SHAPES[0])
    check_ops(TorchOps(config), config, CPU, torch.bfloat16, FLOAT8)
    with pytest.raises(WrongResult, match=words):
        check_ops(kind(config), config, CPU, torch.bfloat16, FLOAT8)


def test_what_is_right_is_taken(tiny: LoadedModel, caplog: pytest.LogCaptureFixture) -> None:
    class Fused(TorchOps):
        pass

    caplog.set_level(logging.INFO)
    assert isinstance(tiny.config, ModelConfig)
    assert type(choose_ops(tiny.config, CPU, torch.float32, torch.float32, Fused)) is Fused
    (record,) = caplog.records
    assert record.getMessage() == "operations chosen"
    assert record.fields["ops"] == "Fused"


def test_what_fails_is_passed_over(tiny: LoadedModel, caplog: pytest.LogCaptureFixture) -> None:
    def fail(config: ModelConfig) -> Ops:
        raise RuntimeError("no compiler")

    assert isinstance(tiny.config, ModelConfig)
    assert type(choose_ops(tiny.config, CPU, torch.float32, torch.float32, fail)) is TorchOps
    assert caplog.records[0].fields["why"] == "RuntimeError: no compiler"


def test_without_triton(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert isinstance(tiny.config, ModelConfig)
    monkeypatch.setitem(sys.modules, "services.engine.model.triton_ops", None)
    assert type(choose_ops(tiny.config, CPU, torch.float32, torch.float32, fused_ops)) is TorchOps
    (record,) = caplog.records
    assert (record.levelno, record.fields["why"]) == (logging.INFO, "triton is not installed")


def test_on_a_cpu_nothing_is_tried(tiny: LoadedModel, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert isinstance(tiny.config, ModelConfig)
    assert type(make_ops(tiny.config, CPU, torch.float32, torch.float32)) is TorchOps
    assert not caplog.records


class TestOnAGpu:
    pytestmark = on_a_gpu

    @pytest.fixture(autouse=True)
    def triton(self) -> None:
        if importlib.util.find_spec("triton") is None:
            pytest.skip("triton is not installed")

    @pytest.mark.parametrize("shape", [*SHAPES, (4096, 14336, 32, 8, 128, False, "silu")])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_the_self_test_of_a_start(self, tiny: LoadedModel, shape: Shape, dtype: torch.dtype) -> None:
        config = config_of(tiny, shape)
        check_ops(fused_ops(config), config, torch.device("cuda"), dtype, dtype)
        if torch.cuda.get_device_capability() >= FLOAT8_CAPABILITY:
            check_ops(fused_ops(config), config, torch.device("cuda"), dtype, FLOAT8)

    def test_a_decoder_gets_them(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)
        load_model(make_tiny_llama(tmp_path), device="cuda", dtype=torch.bfloat16)
        chosen = [record.fields["ops"] for record in caplog.records if record.getMessage() == "operations chosen"]
        assert chosen == ["TritonOps"]

    def test_they_are_captured(self, tiny: LoadedModel) -> None:
        """A replay over other values computes those."""
        config = config_of(tiny, SHAPES[3])
        fused, device = fused_ops(config), torch.device("cuda")
        weight, hidden, gate_up = (torch.randn(*size, device=device) for size in ((1024,), (4, 1024), (4, 6144)))
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            fused.norm(hidden, weight), fused.activate(gate_up)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = fused.norm(hidden, weight), fused.activate(gate_up)
        hidden.normal_(), gate_up.normal_()
        graph.replay()
        plain = TorchOps(config)
        torch.testing.assert_close(results, (plain.norm(hidden, weight), plain.activate(gate_up)))


def test_the_scale_of_an_embedding_is_rounded_to_its_type_and_not_sent(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sending a number to a GPU waits for it, and a graph cannot capture that."""
    config, make_tensor = config_of(tiny, SHAPES[0]), torch.tensor
    embedding = torch.randn(9, config.hidden_size).to(torch.bfloat16)
    ignored = torch.zeros(0, dtype=torch.int64)
    ids = make_tensor([3, 0, 8])
    step = Step(
        ForwardBatch(ids, ids, ids, ignored, ignored, ignored, ignored),
        GatherSdpaAttention(torch.zeros(1, 1, 2, 1, 1, 1)),
    )

    def on_the_cpu(values: float, *, dtype: torch.dtype) -> Tensor:
        return make_tensor(values, dtype=dtype)

    monkeypatch.setattr(torch, "tensor", on_the_cpu)
    scaled = TorchOps(config).embed(step, embedding, 72.33)
    rows = embedding[step.batch.token_ids]
    assert torch.equal(scaled, rows * make_tensor(72.33, dtype=torch.bfloat16))
