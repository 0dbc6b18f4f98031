"""How long a GPU computes nothing of the model between two steps, by its own events.

A step ends when its tokens are chosen and copied; the next one begins when its graph does. What is between is waiting
for the CPU, if that is late, and the copy of the step's inputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from services.engine.batch import ForwardBatch
from services.engine.gpu.graphs import DecodeGraphs
from services.engine.gpu.marks import Mark
from services.engine.gpu.runner import QueuedRunner


class Event(Protocol):
    """A place in the queue of a device."""

    def elapsed_time(self, later: Any, /) -> float:
        """Milliseconds from here to there, once both have passed."""


@dataclass(slots=True)
class Marks:
    """Begins and ends of steps in the order in which they were queued; steps without a graph have ends alone."""

    _marks: list[tuple[bool, Event]] = field(default_factory=list)

    def add(self, event: Event, *, is_end: bool) -> None:
        self._marks.append((is_end, event))

    def clear(self) -> None:
        self._marks.clear()

    def gaps_s(self) -> Sequence[float]:
        """From each end to the begin right behind it; the device must have passed all marks."""
        return [
            event.elapsed_time(behind) / 1e3
            for (is_end, event), (also_end, behind) in itertools.pairwise(self._marks)
            if is_end and not also_end
        ]


class MarkedGraphs(DecodeGraphs):
    """Marks where a graph begins: behind the copies into its memory."""

    __slots__ = ("marks",)
    marks: Marks

    def fill(self, batch: ForwardBatch) -> None:
        """See DecodeGraphs."""
        super().fill(batch)
        self.marks.add(_now(self.model.device), is_end=False)


class MarkedRunner(QueuedRunner):
    """Marks where a step ends."""

    marks: Marks

    def _mark(self) -> Mark:
        if self._kv.device.type != "cuda":
            return super()._mark()
        event = _now(self._kv.device)
        self.marks.add(event, is_end=True)
        return event


def _now(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event
