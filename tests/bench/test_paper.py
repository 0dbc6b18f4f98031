"""What the paper measured comes out of simulated engines, and adaptive keeps up with the best of it."""

from __future__ import annotations

from functools import cache

import pytest

from bench.policies.paper import mean, sweep
from bench.policies.results import Row, compare, rows
from bench.policies.results import Run as Measured

POLICIES = ("data_parallel", "disaggregated", "balanced:0.1", "adaptive")
RATES = (1.6, 4.0, 5.6)


@cache
def measured() -> list[Measured]:
    return sweep(2, POLICIES, RATES, requests=300, repeats=2)


def ratios(found: list[Row], policy: str, rate: float, base: str = "data_parallel") -> list[float]:
    """Times to the first token, for a token and to the last one."""
    return [one / other for one, other in zip(mean(found, policy, rate), mean(found, base, rate), strict=True)]


@pytest.mark.slow
def test_the_shapes_of_the_papers_curves() -> None:
    """Beside each what the paper says."""
    found = rows(measured())
    first = [ratios(found, "disaggregated", rate)[0] for rate in RATES]
    assert 1.2 < first[0] < 1.6, "1.4"
    assert 4 < first[-1] < 10, "8"
    assert first == sorted(first)
    _, token, total = ratios(found, "disaggregated", 5.6)
    assert 0.45 < token < 0.6, "0.53"
    assert 1.2 < total < 1.6, "1.41"
    assert 0.8 < ratios(found, "disaggregated", 4.0)[2] < 0.92, "0.85"
    assert 0.8 < ratios(found, "balanced:0.1", 5.6)[2] < 0.95, "0.87"
    assert 0.55 < ratios(found, "balanced:0.1", 5.6, "disaggregated")[2] < 0.75, "0.62"


@pytest.mark.slow
def test_adaptive_is_as_good_as_the_best_of_them_and_better_where_engines_are_busy() -> None:
    cells = {cell.load: cell for cell in compare(measured())}
    assert all(cell.upper >= 0.97 for cell in cells.values())
    assert cells[4.0].speedup > 1.0
    assert cells[5.6].lower > 1.05
