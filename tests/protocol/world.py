"""A bounded world around the protocol's state machines, for exploring every interleaving.

One receiver's engine with three pages, one transfer service, two senders, one router. Time is a small integer. A page
holds one token. Everything that can happen next is an action; the explorer tries them all in every order. What the
world checks after every action is the safety half of the protocol, what it checks after settle() the other half.
"""

from __future__ import annotations

from collections.abc import Callable

from services.protocol.extents import Extent
from services.protocol.reservation import UNATTACHED, ReservationState
from tests.protocol.state import POOL, Budget, Held, Sender
from tests.protocol.transfer import TransferSide

__all__ = ["Budget", "Sender", "World"]


class World(TransferSide):
    """Which actions there are, and what must hold after each."""

    def actions(self) -> list[tuple[str, Callable[[World], None]]]:
        """Every step that may come next, by name."""
        found: list[tuple[str, Callable[[World], None]]] = []

        def offer(name: str, act: Callable[[World], None], spend: str | None = None) -> None:
            if spend is None:
                found.append((name, act))
            elif getattr(self.budget, spend) > 0:

                def paid(world: World) -> None:
                    setattr(world.budget, spend, getattr(world.budget, spend) - 1)
                    act(world)

                found.append((name, paid))

        if self.receiver_alive:
            if not self.held:
                offer("prep r1", lambda w: w.prep("r1"))
            if "r1" in self.held and "r2" not in self.held:
                offer("prep r2", lambda w: w.prep("r2"), "second_reservation")
            for rid, held in self.held.items():
                self._receiver_actions(rid, held, offer)
            if self.connected and not self.reachable():
                offer("notice lost service", World.notice_lost_service)
            if not self.connected and self.table is not None:
                offer("reconnect", World.reconnect)
            offer("receiver dies", World.receiver_dies, "receiver_deaths")
        elif self.table is None or not self.table.keys(POOL):
            offer("receiver restarts", World.receiver_restarts)
        self._service_actions(offer)
        for name, sender in self.senders.items():
            self._sender_actions(name, sender, offer)
        offer("tick", World.tick, "ticks")
        return found

    def _receiver_actions(self, rid: str, held: Held, offer: Callable[..., None]) -> None:
        machine = held.machine
        if held.machine.expired(self.clock):
            offer(f"expire {rid}", lambda w: w.expire(rid))
        if not held.machine.ended and not held.releasing:
            offer(f"renew {rid}", lambda w: w.renew(rid), "renewals")
            offer(f"prep again {rid}", lambda w: w.prep_again(rid), "prep_retries")
        if machine.state in UNATTACHED:
            offer(f"abort {rid}", lambda w: w.end(rid, "abort"), "aborts")
            offer(f"release {rid}", lambda w: w.end(rid, "release"), "releases")
            if not held.releasing:
                offer(f"publish {rid}", lambda w: w.release_published(rid), "publishes")
            if not held.starting and not held.releasing:
                offer(f"start {rid}", lambda w: w.start(rid), "starts")
        if held.starting and machine.state is ReservationState.FILLED:
            offer(f"attach {rid}", lambda w: w.attach(rid))
        if machine.state is ReservationState.ATTACHED:
            offer(f"finish {rid}", lambda w: w.finish(rid))
        if held.grant == "asked":
            offer(f"grant call of {rid} fails", lambda w: w.grant_failed(rid), "lost_grant_replies")

    def _service_actions(self, offer: Callable[..., None]) -> None:
        if self.table is None:
            offer("service restarts", World.service_restarts)
            return
        for call in self.calls:
            offer(f"service takes {call}", lambda w, call=call: w.service_takes(call))
        if self.receiver_alive and self.reachable() and self.table._changed:
            offer("news arrive", World.news_arrive)
        offer("service dies", World.service_dies, "service_deaths")

    def _sender_actions(self, name: str, sender: Sender, offer: Callable[..., None]) -> None:
        if self.table is None:
            return
        for copy in sender.writing:
            offer(f"{name} copy of {copy[0]} ends", lambda w, c=copy: w.copy_ends(name, c))
        if sender.answer is not None or not sender.alive:
            return
        if sender.attempt is None and self.addressable():
            offer(f"{name} opens", lambda w: w.open_attempt(name))
        if sender.attempt is not None:
            for extent in sender.ranks:
                self._rank_actions(name, sender, extent, offer)
        offer(f"{name} cancels", lambda w: w.sender_stops(name, "cancelled"), "sender_cancels")
        offer(f"{name} dies", lambda w: w.sender_stops(name, "dead"), "sender_deaths")

    def _rank_actions(self, name: str, sender: Sender, extent: Extent, offer: Callable[..., None]) -> None:
        """A rank copies its part of one position after the other."""
        if any(extent == other for _, other in sender.writing):
            return
        copies = ((position, extent) for position in range(sender.range.begin, sender.range.end))
        copy = next((copy for copy in copies if copy not in sender.done), None)
        if copy is not None:
            offer(f"{name} copies {copy[0]} of {extent.kv_heads}", lambda w: w.copy_begins(name, copy))

    def check(self) -> None:
        """Safety: no page in two hands, none lost, no write after free, no two writers at one page."""
        writes = self.writes()
        assert len({(page, head) for _, page, head in writes}) == len(writes), "two copies into one page"
        if not self.receiver_alive:
            return
        counts = self.ledger.counts()
        assert counts.free + counts.cached + counts.held + counts.quarantined == counts.total
        owners: dict[int, str] = {}
        for rid, held in self.held.items():
            if held.machine.ended and not held.quarantined:
                continue
            for page in held.pages:
                assert owners.setdefault(page, rid) == rid, "a page in two hands"
                assert self.ledger.users(page) or self.ledger.is_quarantined(page), "a page in use is free"
        assert counts.held + counts.quarantined == len(owners), "a page is lost"
        for rid, page, _ in writes:
            assert owners.get(page) == rid, "a write after free"
            assert not self.ledger.is_published(page), "a published page is written"
            assert self.held[rid].machine.state is not ReservationState.ATTACHED, "a write under a running sequence"

    def pending(self) -> list[tuple[str, Callable[[World], None]]]:
        """What will happen by itself: nobody needs to ask, fail or die for it."""
        budget, self.budget = self.budget, Budget()
        steps = [(name, act) for name, act in self.actions() if not name.startswith("prep")]
        self.budget = budget
        return [(name, act) for name, act in steps if not (name.endswith("opens") and self._waits(name.split()[0]))]

    def settle(self) -> None:
        """Nothing is under way any more: once the leases run out, nothing may be stuck and nobody unanswered."""
        for _ in range(50):
            pending = self.pending()
            if pending:
                pending[0][1](self)
            elif any(h.machine.state in UNATTACHED for h in self.held.values()) and self.receiver_alive:
                self.clock += 1
            else:
                break
            self.check()
        else:
            raise AssertionError("it never comes to rest")
        counts = self.ledger.counts()
        assert counts.held == counts.quarantined == 0, f"pages are stuck: {counts}"
        assert all(h.prep_answered for h in self.held.values()), "a PrepRecv was never answered"
        assert not any(h.releasing for h in self.held.values()), "a Release was never answered"
        assert not any(h.starting for h in self.held.values()), "a StartGenerate was never answered"
        for name, sender in self.senders.items():
            opened = sender.attempt is not None
            assert sender.answer is not None or not opened, f"the send of {name} was never answered"

    def _waits(self, name: str) -> bool:
        """Whether opening would only be told to wait, which ends when the other sender's copy does."""
        trial = World.thaw(self.freeze())
        trial.open_attempt(name)
        sender = trial.senders[name]
        return sender.attempt is None and sender.answer is None
