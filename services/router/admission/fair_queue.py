"""Turns for many flows, each getting its share of the work however much it asks for."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)


@dataclass(order=True, slots=True)
class _Entry(Generic[Item]):
    start: float  # on the queue's virtual time
    number: int
    item: Item = field(compare=False)
    flow: Hashable = field(compare=False)
    cost: float = field(compare=False)


class FairQueue(Generic[Item]):
    """Start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996) among flows of equal weight.

    Each item gets a start on a virtual time that passes with the cost of what is taken; a flow's next item starts
    where its last one ends, or now if the flow was idle. The earliest start is taken first. So a flow that asks for
    much waits for itself, and its past is forgotten when it has none waiting.
    """

    def __init__(self) -> None:
        self._heap: list[_Entry[Item]] = []
        self._live: dict[Item, _Entry[Item]] = {}
        self._ends: dict[Hashable, float] = {}  # where each flow's last item ends
        self._now = 0.0
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._live)

    def push(self, flow: Hashable, cost: float, item: Item) -> None:
        """Puts in an item of a flow; `cost` is above 0."""
        start = self._start(flow)
        self._ends[flow] = start + cost
        entry = _Entry(start, next(self._numbers), item, flow, cost)
        self._live[item] = entry
        heapq.heappush(self._heap, entry)

    def pop(self) -> tuple[Item, float]:
        """Takes out the next item, with its cost. IndexError if there is none."""
        while True:
            entry = heapq.heappop(self._heap)
            if self._live.pop(entry.item, None) is entry:
                self._now = entry.start
                self._forget()
                return entry.item, entry.cost

    def discard(self, item: Item) -> None:
        """Takes out an item that does not wait any more; what the flow has behind it moves up by its cost."""
        gone = self._live.pop(item, None)
        if gone is not None:
            for entry in self._live.values():
                if entry.flow == gone.flow and entry.start > gone.start:
                    entry.start -= gone.cost
            heapq.heapify(self._heap)
            self._ends[gone.flow] -= gone.cost
            self._forget()

    def cost_before(self, flow: Hashable) -> float:
        """Cost of what would be taken before a new item of the flow."""
        start = self._start(flow)
        return sum(entry.cost for entry in self._live.values() if entry.start <= start)

    def _start(self, flow: Hashable) -> float:
        return max(self._now, self._ends.get(flow, 0.0))

    def _forget(self) -> None:
        """Flows and entries that matter no more go: all of them when nobody waits, else when they are the most."""
        if not self._live:
            self._ends.clear()
            self._heap.clear()
        if len(self._ends) > 2 * len(self._live) + 64:
            self._ends = {flow: end for flow, end in self._ends.items() if end > self._now}
        if len(self._heap) > 2 * len(self._live) + 64:
            self._heap = sorted(self._live.values())
