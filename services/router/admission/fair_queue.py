"""Turns for many flows, each getting its share of the work however much it asks for."""

from __future__ import annotations

import itertools
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from services.router.admission.account import Account, Charge

Item = TypeVar("Item", bound=Hashable)

# Flows that have none waiting and are remembered nevertheless, so that one that asks again is not taken for a new one.
_MOST_IDLE = 1024


@dataclass(frozen=True, slots=True)
class _Flow(Generic[Item]):
    account: Account
    items: dict[Item, tuple[int, float]] = field(default_factory=dict)  # numbers and costs, as they came

    def rank(self) -> tuple[float, int]:
        """The flow with the lowest is next."""
        number, _ = next(iter(self.items.values()))
        return self.account.time, number

    @property
    def cost(self) -> float:
        """Of all items."""
        return sum(cost for _, cost in self.items.values())

    def last(self) -> tuple[float, int, Item]:
        """Where its last item starts, that item's number, and the item."""
        item, (number, cost) = next(reversed(self.items.items()))
        return self.account.time + self.cost - cost, number, item


class FairQueue(Generic[Item]):
    """Start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996) among flows of equal weight.

    A flow's next item starts where its account is, or where the last item that was taken started if the flow had none
    waiting and is behind. The earliest start is taken first, items of a flow as they came. So a flow that asks for much
    waits for itself. All is forgotten when nobody waits.
    """

    def __init__(self) -> None:
        self._waiting: dict[Hashable, _Flow[Item]] = {}
        self._idle: dict[Hashable, Account] = {}  # that became so last is last
        self._flows: dict[Item, Hashable] = {}  # of all items
        self._now = 0.0
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._flows)

    def push(self, flow: Hashable, cost: float, item: Item) -> None:
        """Puts in an item of a flow; `cost` is above 0."""
        waiting = self._waiting.get(flow)
        if waiting is None:
            account = self._idle.pop(flow, None) or Account()
            account.join(self._now)
            waiting = self._waiting[flow] = _Flow(account)
        waiting.items[item] = next(self._numbers), cost
        self._flows[item] = flow

    def pop(self) -> tuple[Item, Charge]:
        """Takes out the next item, for which its flow is charged. IndexError if there is none."""
        if not self._waiting:
            raise IndexError("nobody waits")
        flow = min(self._waiting.values(), key=_Flow.rank)
        self._now = flow.account.time
        item, (_, cost) = next(iter(flow.items.items()))
        charge = flow.account.charge(cost)
        self.discard(item)
        return item, charge

    def charge(self, flow: Hashable, cost: float) -> Charge:
        """A flow has something that did not wait. It is forgotten with the rest if nobody waits."""
        waiting = self._waiting.get(flow)
        if waiting is not None:
            return waiting.account.charge(cost)
        account = self._idle.pop(flow, None) or Account()
        account.join(self._now)
        self._keep(flow, account)
        return account.charge(cost)

    def discard(self, item: Item) -> None:
        """Takes out an item that does not wait any more, if it does."""
        if item not in self._flows:
            return
        name = self._flows.pop(item)
        flow = self._waiting[name]
        del flow.items[item]
        if not flow.items:
            self._keep(name, self._waiting.pop(name).account)

    def _keep(self, flow: Hashable, account: Account) -> None:
        """Remembers a flow that has none waiting, while another has."""
        self._idle[flow] = account
        if not self._waiting:
            self._idle.clear()
        elif len(self._idle) > _MOST_IDLE:
            del self._idle[next(iter(self._idle))]

    def last_behind(self, flow: Hashable) -> Item | None:
        """What would be taken last, if a new item of the flow would be taken before it."""
        if not self._waiting:
            return None
        start, _, item = max((each.last() for each in self._waiting.values()), key=lambda last: last[:2])
        return item if self._start(flow) < start else None

    def _start(self, flow: Hashable) -> float:
        """Where a new item of the flow would start."""
        own = self._waiting.get(flow)
        account = own.account if own is not None else self._idle.get(flow)
        return max(self._now, account.time if account is not None else 0.0) + (0.0 if own is None else own.cost)

    @property
    def cost(self) -> float:
        """Of all items."""
        return sum(flow.cost for flow in self._waiting.values())

    def cost_before(self, flow: Hashable) -> float:
        """Cost of what would be taken before a new item of the flow."""
        own, start = self._waiting.get(flow), self._start(flow)
        before = 0.0 if own is None else own.cost
        for other in self._waiting.values():
            if other is not own:
                before += _cost_until(start, other)
        return before


def _cost_until(end: float, flow: _Flow[Item]) -> float:
    """Cost of those of a flow's items that start until then."""
    start = flow.account.time
    for _, cost in flow.items.values():
        if start > end:
            break
        start += cost
    return start - flow.account.time
