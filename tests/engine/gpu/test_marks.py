"""Layers are told of in order, each when the device has passed its mark, and a device that is lost is told apart."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from services.engine.attention.factory import make_attention
from services.engine.core.plan import RunnerBroken, Segment, StepPlan
from services.engine.gpu.marks import LayerMarks
from services.engine.gpu.runner import QueuedRunner, ending_with
from services.engine.model.loader import load_model
from tests.models import make_tiny_llama

CPU = torch.device("cpu")


@dataclass
class Device:
    """Passes a mark when it is told to, or waited for."""

    passed: int = 0
    marks: list[LateMark] = field(default_factory=list)

    def mark(self) -> LateMark:
        self.marks.append(LateMark(self, len(self.marks) + 1))
        return self.marks[-1]


@dataclass(frozen=True)
class LateMark:
    device: Device
    number: int

    def query(self) -> bool:
        return self.device.passed >= self.number

    def synchronize(self) -> None:
        self.device.passed = max(self.device.passed, self.number)


def test_a_layer_is_told_of_when_the_device_has_passed_it() -> None:
    device, told = Device(), []
    layers = LayerMarks(told.append, device.mark)
    layers.queued(0)
    layers.queued(1)
    assert told == []
    device.passed = 1
    layers.queued(2)
    assert told == [0]
    layers.finish()
    assert (told, device.passed) == ([0, 1, 2], 3)


def test_a_step_tells_of_all_layers_and_is_launched_without_waiting(tmp_path: Path) -> None:
    loaded = load_model(make_tiny_llama(tmp_path), device="cpu", dtype=torch.float32)
    config, device, told = loaded.config, Device(), []
    kv = torch.zeros(config.num_layers, 4, 2, config.num_kv_heads, 4, config.head_dim)
    attention = make_attention("gather_sdpa", kv, config)
    runner = QueuedRunner(loaded.model, attention, kv, new_mark=lambda _: device.mark())
    plan = StepPlan((Segment(1, 0, [5, 6, 7], array("i", [2]), None),))
    launched = runner.launch(plan, told.append)
    assert (told, device.passed) == ([], 0)
    launched.wait()
    assert told == list(range(config.num_layers))
    assert device.passed == config.num_layers + 1, "the end of the step has a mark of its own"


def test_a_device_that_answers_no_more_breaks_the_runner() -> None:
    def lost(device: torch.device) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(RunnerBroken, match="cpu computes nothing any more: bad kernel"), ending_with(CPU, lost):
        raise ValueError("bad kernel")


def test_a_step_that_failed_on_a_sound_device_is_an_ordinary_failure() -> None:
    with pytest.raises(MemoryError), ending_with(CPU):
        raise MemoryError
