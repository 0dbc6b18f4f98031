"""What quantised layers and KV of eight bits lose on a text: the benchmarks say it for four times as much of it."""

from __future__ import annotations

import pytest

from bench.engine.perplexity import perplexity
from services.engine.model.loader import model_folder


@pytest.mark.slow
def test_quantised_layers_stay_within_one_percent_of_float32() -> None:
    folder = model_folder("smollm2-135m")
    exact = perplexity(folder, "float32", 2, 5_120)
    assert 0.98 < perplexity(folder, "int8", 2, 5_120) / exact < 1.01
    assert 0.99 < perplexity(folder, "packed", 2, 5_120) / exact < 1.005  # the default: no weight is rounded again
    assert 0.9995 < perplexity(folder, "packed16", 2, 5_120) / exact < 1.0005  # of activations next to nothing is lost


@pytest.mark.slow
def test_kv_of_eight_bits_costs_little_and_no_more() -> None:
    """Of these tokens 2 %, of more of them 1 %; a wrong number among the keys or values would cost a multiple."""
    folder = model_folder("smollm2-135m")
    assert 0.99 < perplexity(folder, "packed16", 2, 1_536, "fp8") / perplexity(folder, "packed16", 2, 1_536) < 1.04
