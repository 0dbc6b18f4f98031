"""The GPU benchmark with tiny shapes on the CPU: every part gives its figures, and one that fails stops no other."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from bench.gpu.__main__ import TARGETS, main, run
from bench.gpu.copies import Pools, copy_figures
from bench.gpu.engine import make_pool
from bench.gpu.gaps import MarkedGraphs, Marks
from bench.gpu.neighbour import busy_neighbour
from bench.gpu.parts import Bench, Figures, decoding_batch
from bench.gpu.shapes import full, random_model, tiny
from services.engine.attention.gather_sdpa import GatherSdpaAttention
from services.kvtransfer.transports.cuda_ipc.device import CudaDevice
from services.rpc.cuda_driver import CudaDriver
from tests.kvtransfer.cuda.fake_libcuda import FakeLibcuda


@dataclass(frozen=True)
class FakeEvent:
    at_ms: float

    def elapsed_time(self, later: FakeEvent) -> float:
        return later.at_ms - self.at_ms


class Broken(Bench):
    """A device on which one part fails."""

    def decode_attention(self) -> Figures:
        raise RuntimeError("no kernel image is available")


@pytest.mark.slow
def test_every_part_gives_its_figures() -> None:
    figures = run(Bench(tiny(), torch.device("cpu")))
    assert set(figures) >= set(TARGETS)
    assert all(math.isfinite(value) for value in figures.values())


@pytest.mark.slow
def test_a_part_that_fails_is_told_and_the_others_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    figures = run(Broken(tiny(), torch.device("cpu")), ["decode attention", "KV copy"])
    assert "kv_copy_share" in figures
    assert "decode_attention_share" not in figures
    said = capsys.readouterr().out
    assert "decode attention: failed" in said
    assert "no kernel image is available" in said


def test_parts_stop_when_the_time_is_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Bench(tiny(), torch.device("cpu")), budget_s=-1.0) == {}
    assert "large batch: left out, the time is up" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["bench.gpu"])
    main()
    assert capsys.readouterr().out == "There is no GPU that torch can use here: nothing is measured.\n"


@pytest.mark.parametrize("image", [None, 218])
def test_copies_of_the_transfer_service_are_measured_with_and_without_its_kernel(image: int | None) -> None:
    library = FakeLibcuda()
    if image is not None:
        library.failing["cuModuleLoadData"] = image
    driver = CudaDriver(0, library)
    device = CudaDevice(driver)
    source, target = device.allocate(2 * 6 * 64), device.allocate(2 * 6 * 64)
    library.memory(source)[:] = np.arange(2 * 6 * 64) % 251
    figures = copy_figures(driver, Pools(source, target, 2, 6, 64), 1e12, repeats=1)
    ways = ("runs", "plain") if image else ("runs", "plain", "kernel")
    assert set(figures) == {f"kv_copy_{way}_{unit}" for way in ways for unit in ("gb_per_s", "share")}
    assert all(value > 0 for value in figures.values())
    # What was copied last: page for page somewhere else, or all of it alike.
    pages = [library.memory(at).reshape(2, 6, 64)[1].tolist() for at in (source, target)]
    assert (pages[0] == pages[1]) == (image is not None)
    assert sorted(pages[0]) == sorted(pages[1])


@pytest.mark.slow
def test_a_neighbour_computes_until_it_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with busy_neighbour(torch.device("cpu")) as process:
        assert process.poll() is None
    assert process.returncode == 0


def test_the_shapes_are_those_of_llama_8b() -> None:
    shapes = full()
    assert shapes.kv_bytes_per_token == 131_072
    assert shapes.weight_bytes / 1e9 == pytest.approx(15.01, abs=0.005)


def test_gaps_are_from_an_end_to_the_begin_right_behind_it() -> None:
    """A prompt has an end alone; steps without a graph in between make no gap."""
    marks = Marks()
    for is_end, at_ms in ((True, 1.0), (False, 1.25), (True, 6.0), (True, 9.0), (False, 9.5), (True, 12.0)):
        marks.add(FakeEvent(at_ms), is_end=is_end)
    assert marks.gaps_s() == [0.25e-3, 0.5e-3]
    marks.clear()
    assert marks.gaps_s() == []


def test_a_graph_begins_behind_the_copies_of_its_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, device = tiny(), torch.device("cpu")
    graphs = MarkedGraphs(random_model(shapes, device), GatherSdpaAttention(make_pool(shapes, 96, device)), (2,), 3)
    graphs.marks = Marks()
    graphs.marks.add(FakeEvent(1.0), is_end=True)
    batch = decoding_batch(shapes, device)

    def now(device: torch.device) -> FakeEvent:
        assert torch.equal(graphs.static_batch(2).slots, batch.slots)
        return FakeEvent(3.0)

    monkeypatch.setattr("bench.gpu.gaps._now", now)
    graphs.fill(batch)
    assert graphs.marks.gaps_s() == [2e-3]


@pytest.mark.slow
def test_it_needs_numpy_and_torch_alone() -> None:
    """The Python that has torch for a GPU may have nothing of the suite's own packages."""
    refused = ("grpc", "google", "tokenizers", "safetensors", "llvmlite", "numba", "transformers", "prometheus_client")
    code = f"import sys; sys.modules.update(dict.fromkeys({refused})); import bench.gpu.__main__"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
