"""`microserve kv bench`: what it makes of measured times, and its measurements in small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.cli.kvbench import report
from services.cli.kvbench.control import measure_control
from services.cli.kvbench.copying import measure_copying
from services.cli.kvbench.values import Comparison, Overlap, Report, Timeline

SPEED = Comparison("speed", "a", "b", [2.0, 4.0, 1.0], [1.0, 3.0, 1.0], 0.8, higher_is_better=True, num_bytes=10)
TIME = Comparison("time", "a", "b", [2.0, 4.0, 1.0], [1.0, 3.0, 1.0], 1.3)
TIMELINE = Timeline(0.0, 1.0, 0.02, ((0.5, 0.5), (1.0, 1.0)))
OVERLAP = Overlap(10, [0.1, 0.2], [1.0, 1.0], [2.0, 2.0], "tcp", TIMELINE)


def test_ratios_are_medians_of_rounds() -> None:
    assert (SPEED.ratio, SPEED.reached) == (0.75, False)
    assert TIME.ratio == pytest.approx(4 / 3)
    assert not TIME.reached
    assert OVERLAP.exposed_over_total == pytest.approx(0.15)
    assert OVERLAP.limit == 0.15


def test_the_file_has_flat_keys(tmp_path: Path) -> None:
    found = Report({"speed": SPEED, "time": TIME}, OVERLAP)
    written = report.write(found, tmp_path / "out")
    flat = json.loads(written[0].read_text())
    wanted = {"speed": 0.75, "time": 1.3333, "exposed_over_total": 0.15, "layers": 10, "total_over_prefill": 0.5}
    assert flat == wanted
    assert report.table(found).row_count == 3


def test_what_was_not_measured_has_no_key(tmp_path: Path) -> None:
    report.write(Report({"speed": SPEED}), tmp_path)
    assert json.loads((tmp_path / "kv.json").read_text()) == {"speed": 0.75}


@pytest.mark.slow
async def test_copies_are_measured() -> None:
    found = await measure_copying(1, 1)
    suffixes = ("", "_24k")
    assert set(found) == {f"{key}{s}" for key in ("shm_over_memcpy", "scattered_over_contiguous") for s in suffixes}
    assert all(comparison.ratio > 0 for comparison in found.values())


@pytest.mark.slow
async def test_verbs_are_measured() -> None:
    found = await measure_control(1)
    ways = ("control_over_empty", "control_by_calls_over_empty")
    assert set(found) == {f"{way}_c{clients}" for way in ways for clients in (1, 16)}
    assert all(comparison.ratio > 0 for comparison in found.values())
