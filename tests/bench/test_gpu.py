"""The GPU benchmark with tiny shapes on the CPU: every part gives its figures, and one that fails stops no other."""

from __future__ import annotations

import math

import pytest
import torch

from bench.gpu.__main__ import TARGETS, main, run
from bench.gpu.parts import Bench, Figures
from bench.gpu.shapes import full, tiny


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


def test_the_shapes_are_those_of_llama_8b() -> None:
    shapes = full()
    assert shapes.kv_bytes_per_token == 131_072
    assert shapes.weight_bytes / 1e9 == pytest.approx(15.01, abs=0.005)
