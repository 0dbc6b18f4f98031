"""What the commands print for people."""

from __future__ import annotations

import pytest

from services.cli import output
from services.cli.values import Engine, Planner, Policy


def test_what_stands_in_brackets_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    address, problem = "[fd00::1]:50051", "raised ValueError: [/b] :bug:"
    output.print_engines([Engine("e", address, False, problem, "m", "cpu", *[None] * 6, False)])
    output.print_planner(Planner("by_topic", problem, 0.0, 0, (), (), {}, (Policy("by_topic", "", False, ""),)))
    engines, planner = capsys.readouterr().out.split("no planner runs")
    assert address in engines
    assert problem in engines
    assert problem in planner
