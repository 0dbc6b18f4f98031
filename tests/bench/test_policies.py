"""The sweep over policies: paired arrivals, honest figures, and a comparison that finds what was planted."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import pytest

from bench.load import Sample
from bench.policies.machine import Machine
from bench.policies.plot import plot
from bench.policies.results import Run, compare, rows, summary
from bench.policies.traffic import MIXES, NUM_TOPICS, SPREAD, arrivals

ROOT = Path(__file__).resolve().parents[2]


def run(policy: str, jct_s: float, repeat: int = 0, refused: int = 0, load: float = 0.5) -> Run:
    samples = [Sample(0.1, jct_s * (1 + 0.1 * (number % 3)), 11) for number in range(12)]
    kept = (None,) * refused + tuple(samples[refused:])
    return Run(policy, "chat", load, 2.0, repeat, 10.0, kept, ttft_limit_s=0.2, tpot_limit_s=0.2)


@pytest.mark.parametrize("mix", MIXES.values(), ids=lambda mix: mix.name)
def test_arrivals_are_poisson_and_the_same_for_everybody(mix) -> None:  # type: ignore[no-untyped-def]
    made = arrivals(mix, 5.0, 2000, "a")
    assert made == arrivals(mix, 5.0, 2000, "a")
    assert made != arrivals(mix, 5.0, 2000, "b")
    gaps = [after.at_s - before.at_s for before, after in pairwise(made)]
    assert fmean(gaps) == pytest.approx(0.2, rel=0.1)
    assert fmean(gap * gap for gap in gaps) == pytest.approx(2 * 0.2**2, rel=0.2)
    assert fmean(len(each.prompt) for each in made) == pytest.approx(mix.prompt_tokens, rel=0.05)
    assert fmean(each.output_tokens for each in made) == pytest.approx(mix.output_tokens, rel=0.05)
    assert max(each.output_tokens for each in made) <= round(mix.output_tokens * (1 + SPREAD))
    assert len({each.prompt[: mix.shared_tokens] for each in made}) == (NUM_TOPICS if mix.shared_tokens else 1)


def test_a_row_is_what_the_samples_say() -> None:
    [row] = rows([run("adaptive", 1.1)])
    assert (row.requests, row.refused) == (12, 0)
    assert row.jct_mean == pytest.approx(1.21)
    assert row.jct_p99 == pytest.approx(1.32)
    assert row.tpot_mean == pytest.approx(0.111)
    assert row.goodput == pytest.approx(1.2)


def test_a_refused_request_took_as_long_as_the_slowest_of_its_cell() -> None:
    bad, slow = rows([run("adaptive", 1.0, refused=6), run("data_parallel", 5.0)])
    assert bad.refused == 6
    assert bad.jct_mean == pytest.approx((6 * 6.0 + 6 * 1.1) / 12)
    assert bad.jct_p99 == pytest.approx(slow.jct_p99)
    assert bad.goodput == pytest.approx(0.6)


def test_adaptive_is_compared_with_the_best_static_of_each_cell() -> None:
    runs = [
        *(run("adaptive", 1.0, repeat) for repeat in range(3)),
        *(run("data_parallel", 1.2, repeat) for repeat in range(3)),
        *(run("disaggregated", 3.0, repeat) for repeat in range(3)),
        *(run("adaptive", 1.0, repeat, load=0.9) for repeat in range(3)),
        *(run("disaggregated", 0.8, repeat, load=0.9) for repeat in range(3)),
        run("data_parallel", 0.1, 0, load=0.9),  # a policy that lacks repeats is not the best
    ]
    low, high = compare(runs)
    assert (low.best_static, high.best_static) == ("data_parallel", "disaggregated")
    assert (low.speedup, high.speedup) == (pytest.approx(1.2), pytest.approx(0.8))
    assert low.lower <= low.speedup <= low.upper < 1.3
    found = summary(runs)
    assert found["adaptive_speedup_geomean"] == pytest.approx((1.2 * 0.8) ** 0.5)
    assert found["adaptive_worst_cell_upper"] == high.upper < 0.9
    assert found["adaptive_speedup_geomean_lower"] <= found["adaptive_speedup_geomean"]
    assert found["adaptive_speedup_geomean"] <= found["adaptive_speedup_geomean_upper"] < high.speedup * 1.5
    assert len(found["rows"]) == len(runs)


def test_the_interval_is_wide_where_repeats_disagree() -> None:
    steady = [run(policy, 1.0, repeat) for policy in ("adaptive", "data_parallel") for repeat in range(4)]
    lucky = [
        replace(each, samples=run("", 1.0 + each.repeat).samples) if each.policy == "adaptive" else each
        for each in steady
    ]
    [narrow], [wide] = compare(steady), compare(lucky)
    assert wide.upper - wide.lower > 3 * (narrow.upper - narrow.lower)


def test_held_out_the_best_static_policy_has_no_luck_of_its_own() -> None:
    times = {"adaptive": (1.0, 1.0, 1.0), "data_parallel": (0.82, 1.2, 1.01), "balanced:0.5": (1.2, 0.8, 0.97)}
    runs = [run(policy, jct_s, repeat) for policy, jcts in times.items() for repeat, jct_s in enumerate(jcts)]
    [cell] = compare(runs)
    assert cell.best_static == "balanced:0.5"
    assert cell.speedup == pytest.approx((1.2 + 0.8 + 0.97) / 3)
    # Chosen without the repeat that counts: balanced, data_parallel, balanced.
    assert cell.held_out_speedup == pytest.approx((1.2 + 1.2 + 0.97) / 3)
    assert summary(runs)["adaptive_held_out_geomean"] == pytest.approx(cell.held_out_speedup)
    assert summary(runs[::3])["adaptive_held_out_geomean"] is None, "a single repeat"


async def test_a_machine_that_is_slow_is_told_and_waited_for_within_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, work, now_s = Machine(1), iter([0.05, 0.2, 0.2, 0.05]), [0.0]

    def job(_: object) -> None:
        now_s[0] += next(work, 0.2)

    monkeypatch.setattr("bench.policies.machine._job", job)
    monkeypatch.setattr("bench.policies.machine.time", SimpleNamespace(perf_counter=lambda: now_s[0]))
    monkeypatch.setattr("bench.policies.machine.LOOK_EVERY_S", 0.01)
    monkeypatch.setattr("bench.policies.machine.LOOKS", 2)
    assert machine.slowdown() == 1.0
    assert machine.slowdown() > 2
    assert await machine.calm(1.5) < 1.5
    assert await machine.calm(1.5) > 2


def test_what_others_use_of_the_processors_is_told_and_what_is_ours_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    # By the machine's own books, which need not know of every second that a process believes it ran.
    program = "from bench.policies.machine import _busy_s\nend_s = _busy_s() + 0.2\nwhile _busy_s() < end_s: pass"
    others, begin_s = Machine(1).watch(), time.perf_counter()
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
    assert others() * (time.perf_counter() - begin_s) * (os.cpu_count() or 1) >= 0.15, "seconds of the other process"

    # As if nothing but this process ever ran.
    monkeypatch.setattr("bench.policies.machine._busy_s", time.process_time)
    others, end_s = Machine(1).watch(), time.process_time() + 0.2
    begin_s = time.perf_counter()
    while time.process_time() < end_s:
        pass
    assert others() * (time.perf_counter() - begin_s) * (os.cpu_count() or 1) <= 0.05


def test_without_adaptive_nothing_is_claimed() -> None:
    found = summary([run("data_parallel", 1.0)])
    assert (found["adaptive_speedup_geomean"], found["cells"]) == (None, [])


@pytest.mark.slow
def test_a_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runs = [run(policy, 1.0, load=load) for policy in ("adaptive", "data_parallel") for load in (0.4, 0.9)]
    plot(rows(runs), tmp_path / "build" / "sweep.png")
    assert (tmp_path / "build" / "sweep.png").stat().st_size > 10_000
