"""Whose turn is next among all who wait."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

from services.router.admission.account import Account, Charge
from services.router.admission.fair_queue import FairQueue
from services.router.admission.ticket import Priority

Item = TypeVar("Item", bound=Hashable)


class Queues(Generic[Item]):
    """Classes share by their weights, tenants of a class alike; requests of a tenant have their turns as they came.

    Both by start-time fair queueing, with accounts of the same kind. What was had is forgotten when nobody waits.
    """

    def __init__(self) -> None:
        self._queues: dict[Priority, FairQueue[Item]] = {each: FairQueue() for each in Priority}
        self._accounts: dict[Priority, Account] = {}
        self._now = 0.0
        self._forget()

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def num_of(self, priority: Priority) -> int:
        """Requests of a class that wait."""
        return len(self._queues[priority])

    def last_behind(self, priority: Priority, tenant: str) -> Item | None:
        """Of a class, what would have its turn last, if a new request of the tenant would have it before."""
        return self._queues[priority].last_behind(tenant)

    def push(self, priority: Priority, tenant: str, cost: float, item: Item) -> None:
        """A request waits that will cost so much work."""
        if not self._queues[priority]:
            self._accounts[priority].join(self._now)
        self._queues[priority].push(tenant, cost, item)

    def pop(self) -> tuple[Item, tuple[Charge, Charge]]:
        """Takes out the next, for which its tenant and its class are charged. ValueError if there is none."""
        priority = min(self._waiting(), key=lambda each: self._accounts[each].time)
        item, of_tenant = self._queues[priority].pop()
        self._now = self._accounts[priority].time
        of_class = self._accounts[priority].charge(of_tenant.expected)
        self._forget()
        return item, (of_tenant, of_class)

    def charge(self, priority: Priority, tenant: str, cost: float) -> tuple[Charge, Charge]:
        """A request begins without having waited, while others wait."""
        if not self._queues[priority]:
            self._accounts[priority].join(self._now)
        return self._queues[priority].charge(tenant, cost), self._accounts[priority].charge(cost)

    def discard(self, priority: Priority, item: Item) -> None:
        """Takes out one that does not wait any more, if it does."""
        self._queues[priority].discard(item)
        self._forget()

    def work_before(self, priority: Priority, tenant: str) -> float:
        """What of the work that waits now would be done before the turn of a new request, for all classes."""
        own, queue = self._accounts[priority], self._queues[priority]
        before = queue.cost_before(tenant)
        start = (own.time if queue else max(own.time, self._now)) + before / priority.weight
        for other in self._waiting():
            if other is not priority:
                until = max(0.0, start - self._accounts[other].time) * other.weight
                before += min(until, self._queues[other].cost)
        return before

    def _waiting(self) -> list[Priority]:
        return [priority for priority, queue in self._queues.items() if queue]

    def _forget(self) -> None:
        if not self._waiting():
            self._now = 0.0
            self._accounts = {each: Account(each.weight) for each in Priority}
