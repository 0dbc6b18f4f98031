"""Every interleaving of the reservation, grant and attempt rules on a bounded model (tests/protocol/world.py)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from services.protocol.extents import Extent
from services.protocol.grants import Attempt, GrantKey, GrantTable
from services.protocol.pages import PageLedger
from services.protocol.ranges import RangeSet, TokenRange
from services.protocol.reservation import Reservation
from tests.protocol.state import WHOLE
from tests.protocol.world import Budget, Sender, World

LEFT, RIGHT, BOTH = TokenRange(0, 1), TokenRange(1, 2), TokenRange(0, 2)
# The two ranks of a sender, with one of the two heads each.
RANKS = (Extent((0, 1), (0, 1)), Extent((0, 1), (1, 2)))


def disjoint() -> dict[str, Sender]:
    return {"A": Sender(LEFT, 1), "B": Sender(RIGHT, 1)}


def superseding() -> dict[str, Sender]:
    return {"A": Sender(BOTH, 1), "B": Sender(BOTH, 2)}


def two_ranks() -> dict[str, Sender]:
    """One sender of two ranks and one that is whole."""
    return {"A": Sender(LEFT, 1, RANKS), "B": Sender(RIGHT, 1)}


def two_ranks_superseded() -> dict[str, Sender]:
    return {"A": Sender(LEFT, 1, RANKS), "B": Sender(LEFT, 2, RANKS)}


SCENARIOS = {
    "two senders, generate": (disjoint, Budget(starts=1, ticks=1, prep_retries=1)),
    "two senders, lease runs out": (disjoint, Budget(starts=1, ticks=2, renewals=1)),
    "retry supersedes": (superseding, Budget(starts=1, sender_cancels=1, prep_retries=1)),
    "retry supersedes, sender dies": (superseding, Budget(starts=1, sender_deaths=1, aborts=1)),
    "abort and reuse of the pages": (superseding, Budget(aborts=1, second_reservation=1, starts=1)),
    "what is filled is cached, evicted and used again": (disjoint, Budget(releases=1, second_reservation=1, ticks=2)),
    "released to be published": (disjoint, Budget(publishes=1, sender_deaths=1, second_reservation=1)),
    "released to be published, a retry supersedes": (superseding, Budget(publishes=1, aborts=1, sender_cancels=1)),
    "released to be published, lease runs out": (disjoint, Budget(publishes=1, starts=1, ticks=2)),
    "released to be published, the service dies": (disjoint, Budget(publishes=1, service_deaths=1)),
    "released to be published, two ranks send": (two_ranks, Budget(publishes=1, second_reservation=1)),
    "lost grant reply": (disjoint, Budget(lost_grant_replies=1, second_reservation=1, starts=1)),
    "receiver dies": (superseding, Budget(receiver_deaths=1, starts=1, second_reservation=1)),
    "service dies": (disjoint, Budget(service_deaths=1, starts=1, second_reservation=1, aborts=1)),
    "both die": (superseding, Budget(service_deaths=1, receiver_deaths=1, starts=1)),
    "two ranks send": (two_ranks, Budget(starts=1, aborts=1, second_reservation=1)),
    "two ranks, a retry supersedes": (two_ranks_superseded, Budget(aborts=1, sender_deaths=1)),
    "two ranks, the receiver dies": (two_ranks, Budget(receiver_deaths=1, starts=1)),
    "everything once": (disjoint, Budget(ticks=2, aborts=1, starts=1, sender_deaths=1, service_deaths=1)),
}


def explore(start: World, limit: int) -> tuple[int, set[str]]:
    """Visits every reachable state once, checks each, and at every point of rest that nothing is stuck.

    Returns the number of states and the kinds of actions that led to them.
    """
    first = start.freeze()
    seen = {first}
    frontier: list[tuple[bytes, tuple[str, ...]]] = [(first, ())]
    taken: set[str] = set()
    while frontier:
        frozen, path = frontier.pop()
        for name, act in World.thaw(frozen).actions():
            after = World.thaw(frozen)
            try:
                act(after)
                after.check()
                key = after.freeze()
                if key in seen:
                    continue
                if not after.pending():
                    after.settle()
            except AssertionError as error:
                raise AssertionError(f"{error}\nafter: " + "\n       ".join((*path, name))) from error
            taken.add(name.split()[0])
            seen.add(key)
            assert len(seen) < limit, "the model is larger than it was meant to be"
            frontier.append((key, (*path, name)))
    return len(seen), taken


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_every_interleaving_is_safe_and_comes_to_rest(name: str) -> None:
    senders, budget = SCENARIOS[name]
    states, taken = explore(World(senders(), replace(budget)), limit=60_000)
    print(f"{name}: {states} states")
    assert states > 1000
    assert {"prep", "service", "news", "A", "B"} <= taken


def _revoke_without_fence(table: GrantTable, key: GrantKey) -> bool:
    table._tombstones[key] = RangeSet()
    table._granted_pages.clear()
    return table._grants.pop(key, None) is None or True


def _renew_after_expiry(machine: Reservation, now: float, lease_s: float) -> None:
    machine.expires_at = now + lease_s


_MARK_IN_PLACE = GrantTable.mark_in_place


def _commit_early(table: GrantTable, attempt: Attempt, part: TokenRange, extent: Extent) -> bool:
    grant = table._grants[attempt.key]
    grant.committed = grant.committed.add(attempt.range)
    table._note(attempt.key)
    return False


def _publish_at_the_reply(world: World, rid: str) -> None:
    """All that was sent is taken for committed, and its fence not waited for."""
    world.held[rid].machine.progress(RangeSet((BOTH,)), False, world.clock)
    world.publish_if_filled(rid)
    world.end(rid, "release")


def _commit_one_rank(table: GrantTable, attempt: Attempt, part: TokenRange, extent: Extent) -> bool:
    return _MARK_IN_PLACE(table, attempt, part, WHOLE)


MISTAKES = {
    "committed with the heads of one rank": (
        two_ranks, Budget(starts=1), GrantTable, "mark_in_place", _commit_one_rank),
    "pages freed without quarantine": (
        superseding, Budget(aborts=1, second_reservation=1), PageLedger, "quarantine", PageLedger.release),
    "revoke does not wait for the copy": (superseding, Budget(aborts=1), GrantTable, "revoke", _revoke_without_fence),
    "renewal resurrects": (disjoint, Budget(ticks=2, renewals=1), Reservation, "renew", _renew_after_expiry),
    "committed before all is in place": (superseding, Budget(starts=1), GrantTable, "mark_in_place", _commit_early),
    "published before the fence has answered": (
        disjoint, Budget(publishes=1), World, "release_published", _publish_at_the_reply),
    "the last word is lost": (
        disjoint, Budget(publishes=1), GrantTable, "last_committed", lambda table, key: RangeSet()),
    "a fenced attempt goes on writing": (
        superseding, Budget(starts=1), GrantTable, "_require_live", lambda table, attempt: None),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", MISTAKES)
def test_the_exploration_finds_planted_mistakes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    senders, budget, owner, method, mistake = MISTAKES[name]
    monkeypatch.setattr(owner, method, mistake)
    with pytest.raises((AssertionError, KeyError, ValueError)):
        explore(World(senders(), replace(budget)), limit=60_000)
