"""Captured decoding: on a GPU against the plain runner on the CPU, everywhere what it reads."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from services.engine.attention.factory import make_attention
from services.engine.core.plan import StepPlan
from services.engine.core.runner import TorchRunner
from services.engine.gpu.graphs import decode_graphs
from services.engine.gpu.runner import QueuedRunner
from services.engine.model.loader import load_model
from services.engine.sampling.params import SamplingParams
from tests.engine.core.answers import Clock
from tests.engine.core.test_torch import OPTIONS, pool_of, prompt_of
from tests.engine.core.world import Node, make_config
from tests.models import make_tiny_llama

on_a_gpu = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


class Counting(QueuedRunner):
    """Counts the steps that a graph computed."""

    num_captured = 0

    def launch(self, plan: StepPlan, on_layer):  # type: ignore[no-untyped-def]
        assert self._graphs is not None
        self.num_captured += bool(self._graphs.bucket(plan))
        return super().launch(plan, on_layer)


def node(tmp_path: Path, device: str) -> Node:
    folder = tmp_path / device
    folder.mkdir()
    config = make_config(**OPTIONS, num_pages=64)
    loaded = load_model(make_tiny_llama(folder), device=device, dtype=torch.float32)
    kv = pool_of(config).to(device)
    attention = make_attention("gather_sdpa", kv, loaded.model.config)
    if device == "cpu":
        runner = TorchRunner(loaded.model, attention, kv)
    else:
        graphs = decode_graphs(loaded.model, kv, config.max_batch_size, config.max_context)
        runner = Counting(loaded.model, attention, kv, graphs=graphs)
    return Node(Clock(), None, "E", make_runner=lambda _: runner, **OPTIONS, num_pages=64)


class TestOnAGpu:
    pytestmark = on_a_gpu

    @pytest.mark.parametrize("temperature", [0.0, 0.8])
    def test_the_tokens_of_the_plain_runner_on_the_cpu(self, tmp_path: Path, temperature: float) -> None:
        tokens = []
        for device in ("cpu", "cuda"):
            engine = node(tmp_path, device)
            streams = [
                engine.generate(prompt_of(length), SamplingParams(max_tokens=20, temperature=temperature, seed=length))
                for length in (1, 9, 33)
            ]
            engine.run()
            engine.assert_idle()
            tokens.append([stream.tokens for stream in streams])
            if isinstance(engine.runner, Counting):
                assert engine.runner.num_captured > 15, "decoding was not captured: the log says why"
        assert tokens[0] == tokens[1]


@pytest.mark.usefixtures("not_interpreted")
def test_without_triton_on_a_gpu_there_are_no_graphs_and_the_log_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if torch.cuda.is_available():
        pytest.skip("no GPU is wanted here")
    caplog.set_level(logging.WARNING)
    loaded = load_model(make_tiny_llama(tmp_path), device="cpu", dtype=torch.float32)
    kv = pool_of(make_config(**OPTIONS))
    assert decode_graphs(loaded.model, kv, 8, 128) is None
    (record,) = caplog.records
    assert record.message == "decoding is not captured"
    assert str(record.__dict__["fields"]["why"]).startswith("BackendUnavailable")
