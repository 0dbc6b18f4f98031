"""Fails unless every skipped test of a run was skipped for a reason that is allowed.

    python -m pytest --junitxml=report.xml
    python tests/skips.py .ci/allowed-skips report.xml

The list of allowed reasons has one regular expression a line; lines that begin with # say why. A run without a
report, or whose report holds no test, fails too: then nothing was proved.
"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path


def allowed_reasons(path: Path) -> list[re.Pattern[str]]:
    """The expressions of a list file."""
    lines = (line.strip() for line in path.read_text().splitlines())
    return [re.compile(line) for line in lines if line and not line.startswith("#")]


def skipped_tests(report: Path) -> Iterator[tuple[str, str]]:
    """(test, reason) of every skipped or expected-to-fail test. ValueError if the report holds no test."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    if not cases:
        raise ValueError(f"{report}: no test ran")
    for case in cases:
        for skip in case.iter("skipped"):
            yield f"{case.get('classname')}::{case.get('name')}", skip.get("message", "")


def main(argv: list[str]) -> int:
    """Prints every skip and whether it is allowed; 1 if one is not, or if a report is missing."""
    allowed = allowed_reasons(Path(argv[0]))
    refused = False
    for report in map(Path, argv[1:]):
        try:
            skipped = list(skipped_tests(report))
        except (OSError, ValueError, ElementTree.ParseError) as error:
            print(f"no proof: {error}", file=sys.stderr)
            return 1
        for test, reason in skipped:
            good = any(pattern.fullmatch(reason) for pattern in allowed)
            print(f"{'allowed' if good else 'REFUSED'} skip: {test}: {reason}")
            refused |= not good
    return int(refused)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
