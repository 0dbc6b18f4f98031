"""Guides as the core sees them: compiled elsewhere, off the loop thread, and then followed token by token.

A guide's state depends on the tokens generated alone, wherever they were: a continuation replays them, and a
preempted sequence keeps its state, because tokens are never taken back.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from services.engine.sampling.guide import Guide


class GuideState(Protocol):
    """Where one sequence is in the language of its guide. Belongs to the loop thread once it was handed over."""

    @property
    def allowed(self) -> NDArray[np.uint8]:
        """One bit a token id, the least significant of a byte first: which tokens may come next."""

    @property
    def is_finished(self) -> bool:
        """Whether the output is complete and nothing may follow."""

    def advance(self, token: int) -> None:
        """Takes the token that was chosen. Raises InvalidGuide if the guide proves too complex to be followed."""


class GuidePort(Protocol):
    """Whoever compiles guides."""

    def compile(self, number: int, guide: Guide, produced: tuple[int, ...]) -> None:
        """Compiles a guide for sequence `number`, which has produced these tokens already; answered by GuideReady.

        Raises QueueFull, and then there is no answer.
        """

    def cancel(self, number: int) -> None:
        """Nobody wants the guide of that sequence any more; what is being compiled already may still be answered."""

    def close(self) -> None:
        """Compiles nothing more; what has no answer yet gets none."""
