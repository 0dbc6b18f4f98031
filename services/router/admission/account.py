"""What those who share something have had of it."""

from __future__ import annotations

from dataclasses import dataclass

# What was paid for and not had counts up to so much: some answers.
MOST_CREDIT = 8192.0


class Account:
    """What one has had, over its weight: a virtual time. Of those who wait, the one with the least has the next turn.

    What a turn is expected to cost is paid when it begins, the rest when it has ended. What was paid too much is taken
    off what comes later, but never more than half of it. So the time never goes back, whoever waits is passed by no
    refund, and nobody gets more than twice its share for having been overcharged.
    """

    __slots__ = ("credit", "time", "weight")

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight
        self.time = 0.0
        self.credit = 0.0  # work paid for and not had, at most MOST_CREDIT

    def join(self, now: float) -> None:
        """It waits from `now` on, and had none waiting before: it has saved nothing up."""
        self.credit = min(self.credit, max(0.0, self.time - now) * self.weight)
        self.time = max(self.time, now)

    def charge(self, cost: float) -> Charge:
        """A turn of it begins that will cost about so much."""
        self._pay(cost)
        return Charge(self, cost)

    def settle(self, expected: float, cost: float) -> None:
        """What was expected to cost so much has cost so much."""
        if cost > expected:
            self._pay(cost - expected)
        else:
            self.credit = min(self.credit + expected - cost, MOST_CREDIT)

    def _pay(self, cost: float) -> None:
        refund = min(self.credit, cost / 2)
        self.credit -= refund
        self.time += (cost - refund) / self.weight


@dataclass(frozen=True, slots=True)
class Charge:
    """What an account was charged for a turn. If it is forgotten meanwhile, what is settled later has no effect."""

    account: Account
    expected: float

    def settle(self, cost: float) -> None:
        """The turn has ended, and has cost so much."""
        self.account.settle(self.expected, cost)
