"""`microserve simulate`: the user's program beside the built-in ones, and what is wrong said in a line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run

HERE = Path(__file__).resolve().parents[2]


def test_programs_are_compared_under_the_same_arrivals(microserve: Run) -> None:
    own = HERE / "docs/examples/migrate_then_run.py"
    command = ("simulate", "data_parallel", "balanced:0.5", str(own), "--requests", "20", "--rate", "2", "--json")
    code, out, err = microserve(*command)
    assert (code, err) == (0, "")
    rows = json.loads(out)
    assert [(row["policy"], row["requests"], row["failed"]) for row in rows] == [
        ("data_parallel", 20, 0),
        ("balanced:0.5", 20, 0),
        (str(own), 20, 0),
    ]
    assert all(0 < row["ttft_ms"] < row["jct_ms"] <= row["jct_p99_ms"] for row in rows)
    [row] = json.loads(microserve("simulate", f"{HERE}/docs/examples/long_to_big.py:long=5", *command[-5:])[1])
    assert row["failed"] == 0
    # Nothing is cached, so there is nothing to move.
    assert rows[2]["jct_ms"] == rows[0]["jct_ms"] != rows[1]["jct_ms"]
    assert microserve(*command)[1] == out


def test_a_table_for_people(microserve: Run) -> None:
    code, out, _ = microserve("simulate", "adaptive", "--requests", "3", "--shared-tokens", "64")
    assert code == 0
    assert "adaptive" in out
    assert "jct p99 ms" in out


def test_what_cannot_be_simulated_is_a_line(microserve: Run, tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("policy = 1")
    for arguments in (("nonsense",), (str(broken),), ("adaptive", "--hardware", "abacus")):
        code, out, err = microserve("simulate", *arguments)
        assert code != 0
        assert out == ""
        assert err.count("\n") == 1
        assert err.startswith("microserve: ")


def test_what_fails_every_request_is_told_once(
    microserve: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("async def policy(request, fleet):\n    fleet.nothing\n    yield\n")
    code, out, _ = microserve("simulate", str(broken), str(broken), "--requests", "5", "--json")
    assert (code, [row["failed"] for row in json.loads(out)]) == (0, [5, 5])
    told = ["policy failed", "4 failures like these were left out"]
    assert [record.getMessage() for record in caplog.records] == told * 2


def test_a_second_way_to_fail_is_told_too(microserve: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = tmp_path / "broken.py"
    ways = "(ValueError('one'), KeyError('two'), KeyError('three'))[len(asked) % 3]"
    policy = f"async def policy(request, fleet):\n    asked.append(1)\n    raise {ways}\n    yield\n"
    broken.write_text(f"asked = []\n\n\n{policy}")
    microserve("simulate", str(broken), "--requests", "9", "--json")
    raised = {repr(record.exc_info[1]) for record in caplog.records if record.exc_info}
    assert raised == {"ValueError('one')", "KeyError('two')", "KeyError('three')"}
    assert caplog.records[-1].getMessage() == "6 failures like these were left out"


def test_failures_that_are_all_different_are_told_some_of(
    microserve: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("async def policy(request, fleet):\n    raise ValueError(request.request_id)\n    yield\n")
    microserve("simulate", str(broken), "--requests", "30", "--json")
    assert len(caplog.records) == 21
    assert caplog.records[-1].getMessage() == "10 failures like these were left out"
