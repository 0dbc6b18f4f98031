"""The reader of skip reports."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.skips import main

SKIPPED = '<testcase classname="a" name="b"><skipped message="{}"/></testcase>'


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ('<testcase classname="a" name="b"/>', 0),
        (SKIPPED.format("no GPU here"), 0),
        (SKIPPED.format("no GPU here, and more"), 1),
        (SKIPPED.format("flaky"), 1),
        ("", 1),
        ("<", 1),
    ],
)
def test_only_allowed_reasons_pass(tmp_path: Path, content: str, code: int) -> None:
    (tmp_path / "allowed").write_text("# no machine with one\nno GPU here\n")
    (tmp_path / "report.xml").write_text(f"<testsuites><testsuite>{content}</testsuite></testsuites>")
    assert main([str(tmp_path / "allowed"), str(tmp_path / "report.xml")]) == code


def test_missing_report_is_no_proof(tmp_path: Path) -> None:
    (tmp_path / "allowed").write_text("")
    assert main([str(tmp_path / "allowed"), str(tmp_path / "none.xml")]) == 1
