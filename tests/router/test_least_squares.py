"""Coefficients fitted to noisy observations."""

from __future__ import annotations

import random
from statistics import fmean

import pytest

from services.router.cost.least_squares import LeastSquares
from services.router.cost.speeds import PREFILL_S_PER_TOKEN, DecodeWork, EngineSpeeds, StepsWork
from tests.router.cost_scene import step_s


def test_coefficients_are_found() -> None:
    source, model = random.Random(3), LeastSquares((0.0, 1e-4), (1.0, 1e-1))
    for _ in range(100):
        x = source.uniform(1, 1000)
        model.observe((1.0, x), (0.02 + 3e-3 * x) * source.uniform(0.95, 1.05))
    assert model.coefficients[1] == pytest.approx(3e-3, rel=0.05)
    assert model.predict((1.0, 500)) == pytest.approx(1.52, rel=0.05)


def test_the_first_observation_counts_for_nearly_all() -> None:
    model = LeastSquares((PREFILL_S_PER_TOKEN,), (3 * PREFILL_S_PER_TOKEN,))
    model.observe((100.0,), 0.2)
    assert model.predict((100.0,)) == pytest.approx(0.2, rel=0.05)


@pytest.mark.parametrize("factor", [0.001, 30.0, 1000.0])
def test_an_outlier_hardly_matters(factor: float) -> None:
    model = LeastSquares((1e-4,), (1e-1,))
    for _ in range(30):
        model.observe((100.0,), 0.2)
    model.observe((100.0,), 0.2 * factor)
    assert model.predict((100.0,)) == pytest.approx(0.2, rel=0.1)


@pytest.mark.parametrize("factor", [0.2, 5.0])
def test_a_lasting_change_is_believed(factor: float) -> None:
    model = LeastSquares((1e-4,), (1e-1,))
    for _ in range(200):
        model.observe((100.0,), 0.2)
    for _ in range(60):
        model.observe((100.0,), 0.2 * factor)
    assert model.predict((100.0,)) == pytest.approx(0.2 * factor, rel=0.2)


@pytest.mark.parametrize("seed", range(4))
def test_slow_observations_count_as_much_as_quick_ones(seed: int) -> None:
    source, model, found = random.Random(seed), LeastSquares((1e-4,), (1e-1,)), list[float]()
    for number in range(400):
        model.observe((100.0,), 0.2 * source.lognormvariate(-0.08, 0.4))  # 0.2 on average
        if number > 50:
            found.append(model.predict((100.0,)))
    assert fmean(found) == pytest.approx(0.2, rel=0.05)


def test_more_work_never_takes_less_time() -> None:
    model = LeastSquares((0.0, 1e-3, 0.0), (1.0, 1e-2, 1e-2))
    source = random.Random(5)
    for _ in range(200):
        x = (1.0, source.uniform(1, 100), source.uniform(1, 100))
        model.observe(x, max(1e-3, 1.0 - 5e-3 * x[2]))
        assert min(model.coefficients) >= 0


@pytest.mark.parametrize("seed", range(5))
def test_thousands_of_observations_stay_numerically_sound(seed: int) -> None:
    """Features as they come: a constant, a few sequences, thousands of tokens of context, the last two correlated."""
    source, speeds, errors = random.Random(seed), EngineSpeeds(), list[float]()
    for number in range(3000):
        sequences = source.randrange(1, 12)
        work = DecodeWork(sequences, sequences * source.uniform(300, 500))
        seconds = step_s(sequences) + 1e-6 * work.context
        if number > 20:
            errors.append(abs(speeds.step_s(work) / seconds - 1))
        luck = source.choice((0.5, 1, 1, 1, 1, 1, 1, 1, 1, 40)) if number > 20 else 1
        steps = StepsWork(1, rows=work.sequences, row_context=work.context)
        speeds.steps.observe(steps.features, seconds * luck * source.uniform(0.9, 1.1))
    errors.sort()
    assert errors[len(errors) // 2] < 0.05
    assert errors[int(0.99 * len(errors))] < 0.2
    assert errors[-1] < 0.5


def test_forgetting_does_not_make_the_unobserved_uncertain_without_bound() -> None:
    model = LeastSquares((0.01, 1e-3), (1.0, 1e-2))
    for _ in range(5000):
        model.observe((1.0, 0.0), 0.05)
    model.observe((1.0, 10.0), 0.06)
    assert model.predict((1.0, 0.0)) == pytest.approx(0.05, rel=0.05)
    assert model.coefficients[1] <= 1e-2
