"""The command as people run it, and a fake router to run it against."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from services.cli import main as cli
from services.cli.fleet import Fleet

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def router_address() -> Iterator[str]:
    """A fake router process for commands that only read."""
    with Fleet(package="tests.cli.fakes") as fleet:
        yield fleet.start_router(["10.0.0.1:1"], "disaggregated").address


@pytest.fixture
def microserve(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`microserve("ask", "Hi")` returns exit code, stdout and stderr of the command run in this process."""

    def run(*argv: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["microserve", *argv])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capfd.readouterr()
        assert isinstance(caught.value.code, int)
        return caught.value.code, out, err

    return run
