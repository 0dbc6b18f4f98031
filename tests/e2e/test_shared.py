"""What modules share is started once, and anew after one that spoiled it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from tests.e2e.shared import SharedSuite
from tests.e2e.suite import Suite


@dataclass
class Process:
    """As much of a service as is looked at."""

    name: str = "kvtransfer"
    code: int | None = None

    def poll(self) -> int | None:
        return self.code


class Starter:
    """Counts starts and stops of suites that are one process."""

    def __init__(self) -> None:
        self.started = self.stopped = 0

    @asynccontextmanager
    async def __call__(self) -> AsyncIterator[Suite]:
        self.started += 1
        process: Any = Process()
        yield Suite(fleet=None, kvtransfer=process, transfer=None, engines=[], channels=[])  # type: ignore[arg-type]
        self.stopped += 1


async def test_borrowers_one_after_the_other_have_the_same() -> None:
    starter = Starter()
    shared = SharedSuite(starter)
    assert starter.started == 0
    async with shared.lent() as first:
        pass
    async with shared.lent() as second:
        assert second is first
    assert (starter.started, starter.stopped) == (1, 0)
    await shared.close()
    await shared.close()
    assert (starter.started, starter.stopped) == (1, 1)


async def test_who_spoils_it_is_told_and_the_next_has_a_new_one() -> None:
    starter = Starter()
    shared = SharedSuite(starter)
    with pytest.raises(AssertionError, match="kvtransfer has ended"):
        async with shared.lent() as first:
            first.kvtransfer.code = -9  # type: ignore[attr-defined]
    assert (starter.started, starter.stopped) == (1, 1)
    async with shared.lent() as second:
        assert second is not first
    await shared.close()
    assert (starter.started, starter.stopped) == (2, 2)
