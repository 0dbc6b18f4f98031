"""Tests of the whole core run twice: steps are over at once, or are computed as late as they may be."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engine.core.world import LAG

BOTH = (
    "cancel", "faults", "generate", "guides", "leases", "prefix_waits", "prompt_logprobs", "refusals", "regressions",
    "retries", "room", "service_loss", "transfer",
)  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that says what one step does names its lag itself, with world.at_once."""
    names_it = any("lag" in mark.args[:1] for mark in metafunc.definition.iter_markers("parametrize"))
    if not names_it and metafunc.module.__name__.rpartition("test_")[2] in BOTH:
        metafunc.parametrize("lag", [0, 1], ids=["", "late"], indirect=True)


@pytest.fixture(autouse=True)
def lag(request: pytest.FixtureRequest) -> Iterator[int]:
    """Steps that may lag behind."""
    value = getattr(request, "param", 0)
    token = LAG.set(value)
    yield value
    LAG.reset(token)
