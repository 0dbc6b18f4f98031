"""An event loop whose clock jumps to the next timer as soon as nothing else is to be done."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from functools import partial
from typing import Any, TypeVar

Result = TypeVar("Result")

# What takes longer waits for what never comes, while something looks again and again.
_LONGEST_S = 86_400.0


class _JumpingSelector(selectors.DefaultSelector):
    """In place of waiting it lets the time pass."""

    now = 0.0

    def __init__(self, longest_s: float) -> None:
        super().__init__()
        self._longest_s = longest_s

    def select(self, timeout: float | None = None) -> Any:
        events = super().select(0)
        if not events:
            assert timeout is not None, "everything waits, and no timer will ever end it"
            assert self.now + timeout <= self._longest_s, f"it takes longer than {self._longest_s:g} s"
            self.now += timeout
        return events


class VirtualLoop(asyncio.SelectorEventLoop):
    """Begins at 0 s."""

    def __init__(self, longest_s: float = _LONGEST_S) -> None:
        self._clock = _JumpingSelector(longest_s)
        super().__init__(self._clock)

    def time(self) -> float:
        """Seconds of simulated time."""
        return self._clock.now


def run(main: Coroutine[Any, Any, Result], longest_s: float = _LONGEST_S) -> Result:
    """As asyncio.run, in no time. AssertionError when `longest_s` of simulated time are over."""
    with asyncio.Runner(loop_factory=partial(VirtualLoop, longest_s)) as runner:
        return runner.run(main)
