"""A bounded world around the protocol's state machines, for exploring every interleaving.

One receiver's engine with three pages, one transfer service, two senders, one router. Time is a small integer. A page
holds one token. Everything that can happen next is an action; the explorer tries them all in every order. What the
world checks after every action is the safety half of the protocol, what it checks after settle() the other half.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, field

from services.protocol.errors import ProtocolError, ReservationGone
from services.protocol.grants import AlreadyCommitted, Attempt, Draining, GrantKey, GrantSpec, GrantTable
from services.protocol.pages import OutOfPages, PageLedger
from services.protocol.ranges import TokenRange
from services.protocol.reservation import UNATTACHED, Reservation, ReservationState

POOL = "pool"
NUM_PAGES = 3
WINDOW = TokenRange(0, 2)
LEASE = 2
POISON, TORN = "poison", "torn"


@dataclass
class Held:
    """What the receiver's engine knows of a reservation."""

    machine: Reservation
    pages: tuple[int, ...]
    secret: bytes
    epoch: int  # of the service that its address names
    grant: str = "asked"  # asked, open, revoking, drained
    quarantined: bool = False
    prep_answered: bool = False
    starting: bool = False  # a StartGenerate waits for it or runs on it


@dataclass
class Sender:
    """A RemoteSend at one of the sending engines."""

    range: TokenRange
    number: int
    alive: bool = True
    asked: bool = False
    attempt: Attempt | None = None
    writing: int | None = None
    done_positions: frozenset[int] = frozenset()
    answer: str | None = None


@dataclass
class Budget:
    """How often each disturbance may still happen."""

    ticks: int = 0
    renewals: int = 0
    aborts: int = 0
    releases: int = 0
    starts: int = 0
    second_reservation: int = 0
    prep_retries: int = 0
    lost_grant_replies: int = 0
    sender_cancels: int = 0
    sender_deaths: int = 0
    receiver_deaths: int = 0
    service_deaths: int = 0


@dataclass
class World:
    """State of everything; copied by pickling."""

    senders: dict[str, Sender]
    budget: Budget
    clock: int = 0
    ledger: PageLedger = field(default_factory=lambda: PageLedger(NUM_PAGES))
    incarnation: int = 1
    receiver_alive: bool = True
    held: dict[str, Held] = field(default_factory=dict)
    table: GrantTable | None = field(default_factory=GrantTable)
    epoch: int = 1
    known_epoch: int = 1
    connected: bool = True  # the engine believes that it has the service of known_epoch
    content: list[str] = field(default_factory=lambda: [POISON] * NUM_PAGES)
    calls: tuple[tuple[str, int, int, str], ...] = ()  # (kind, epoch, incarnation, reservation)

    def freeze(self) -> bytes:
        """The state as a value: for comparing and for copying."""
        return pickle.dumps(self, protocol=pickle.HIGHEST_PROTOCOL)

    @staticmethod
    def thaw(frozen: bytes) -> World:
        """A world of its own in that state."""
        world = pickle.loads(frozen)
        assert isinstance(world, World)
        return world

    # --- what can happen next -------------------------------------------------------------------------------

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
        if not held.machine.ended:
            offer(f"renew {rid}", lambda w: w.renew(rid), "renewals")
            offer(f"prep again {rid}", lambda w: w.prep_again(rid), "prep_retries")
        if machine.state in UNATTACHED:
            offer(f"abort {rid}", lambda w: w.end(rid, "abort"), "aborts")
            offer(f"release {rid}", lambda w: w.end(rid, "release"), "releases")
            if not held.starting:
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
        if self.table is None or sender.answer is not None:
            return
        if sender.writing is not None:
            offer(f"{name} copy ends", lambda w: w.copy_ends(name))
        if not sender.alive:
            return
        if sender.attempt is None and self.addressable():
            offer(f"{name} opens", lambda w: w.open_attempt(name))
        if sender.attempt is not None and sender.writing is None:
            for position in range(sender.range.begin, sender.range.end):
                if position not in sender.done_positions:
                    offer(f"{name} copies {position}", lambda w, p=position: w.copy_begins(name, p))
                    break
        offer(f"{name} cancels", lambda w: w.sender_stops(name, "cancelled"), "sender_cancels")
        offer(f"{name} dies", lambda w: w.sender_stops(name, "dead"), "sender_deaths")

    # --- receiver's engine --------------------------------------------------------------------------------------

    def reachable(self) -> bool:
        """Whether the engine is connected and the service it is connected to still lives."""
        return self.connected and self.table is not None and self.known_epoch == self.epoch

    def prep(self, rid: str) -> None:
        """PrepRecv: pages, then a grant. Refused at once if pages are short or the service is known gone."""
        if not self.connected:
            return
        try:
            pages = self.ledger.allocate(len(WINDOW))
        except OutOfPages:
            return
        for page in pages:
            self.content[page] = POISON
        self.held[rid] = Held(
            Reservation(WINDOW, self.clock, LEASE), pages, f"secret of {rid}".encode(), self.known_epoch
        )
        self._call("grant", rid)

    def _call(self, kind: str, rid: str) -> None:
        """A call that the service will take some time, in any order with others."""
        self.calls = tuple(sorted({*self.calls, (kind, self.known_epoch, self.incarnation, rid)}))

    def prep_again(self, rid: str) -> None:
        """A retry of PrepRecv finds the reservation and changes nothing."""
        before = pickle.dumps((self.ledger, self.held))
        assert self.held[rid].machine.window == WINDOW
        assert pickle.dumps((self.ledger, self.held)) == before

    def grant_failed(self, rid: str) -> None:
        """The reply to Grant was lost: the engine does not know, so it must revoke before it forgets."""
        held = self.held[rid]
        held.prep_answered = True
        if held.machine.state in UNATTACHED:
            self.end(rid, "abort")

    def renew(self, rid: str) -> None:
        machine = self.held[rid].machine
        was_over = machine.expired(self.clock) or machine.ended
        try:
            machine.renew(self.clock, LEASE)
        except ReservationGone:
            assert was_over
        else:
            assert not was_over, "a renewal brought a reservation back"

    def expire(self, rid: str) -> None:
        self.held[rid].machine.expire()
        self._give_up_pages(rid)

    def end(self, rid: str, how: str) -> None:
        machine = self.held[rid].machine
        if how == "abort":
            machine.abort()
        elif machine.release(self.clock):
            self._publish_and_free(rid)
            return
        self._give_up_pages(rid)

    def start(self, rid: str) -> None:
        self.held[rid].starting = True

    def attach(self, rid: str) -> None:
        """StartGenerate takes the pages over and reads them."""
        held = self.held[rid]
        try:
            held.machine.attach(self.clock)
        except ReservationGone:
            held.starting = False
            return
        self._read(rid)
        self._revoke(rid)

    def finish(self, rid: str) -> None:
        """The sequence ends; it reads to the last moment."""
        self._read(rid)
        self.held[rid].machine.detach()
        self.held[rid].starting = False
        self.ledger.release(self.held[rid].pages)

    def _read(self, rid: str) -> None:
        held = self.held[rid]
        for position, page in zip(range(WINDOW.begin, WINDOW.end), held.pages, strict=True):
            assert self.content[page] == f"{rid}:{position}", f"read {self.content[page]} before commit"

    def _publish_and_free(self, rid: str) -> None:
        self._read(rid)
        for page in self.held[rid].pages:
            self.ledger.publish(page)
        self.ledger.release(self.held[rid].pages)
        self._revoke(rid)

    def _give_up_pages(self, rid: str) -> None:
        held = self.held[rid]
        held.starting = False
        self.ledger.quarantine(held.pages)
        held.quarantined = True
        if held.grant == "drained":
            self._leave_quarantine(held)
        else:
            self._revoke(rid)

    def _leave_quarantine(self, held: Held) -> None:
        held.quarantined = False
        self.ledger.drained(held.pages)

    def _revoke(self, rid: str) -> None:
        held = self.held[rid]
        held.prep_answered = True
        if held.grant == "drained":
            return
        held.grant = "revoking"
        if self.connected:
            self._call("revoke", rid)

    def notice_lost_service(self) -> None:
        """The service's process is known gone: nothing it was asked to write is written any more."""
        self.connected = False
        self.calls = tuple(call for call in self.calls if call[1] != self.known_epoch)
        for rid, held in self.held.items():
            if held.grant == "drained":
                continue
            held.grant = "drained"
            held.prep_answered = True
            if held.quarantined:
                self._leave_quarantine(held)
            elif held.machine.state in (ReservationState.RESERVED, ReservationState.FILLING):
                self.end(rid, "abort")

    def reconnect(self) -> None:
        """The engine hands its descriptors to the new incarnation; contents stay."""
        self.connected = True
        self.known_epoch = self.epoch

    def receiver_dies(self) -> None:
        """kill -9: its memory is gone; the service sees the connection end."""
        self.receiver_alive = False
        if self.table is not None:
            for key in self.table.keys(POOL):
                self.table.revoke(key)

    def receiver_restarts(self) -> None:
        """A new engine attaches; the service has drained the old one's grants."""
        assert not self.writes(), "a new engine was let in while the old one's pages are written"
        self.receiver_alive = True
        self.incarnation += 1
        self.ledger = PageLedger(NUM_PAGES)
        self.held = {}
        self.connected = self.table is not None
        self.known_epoch = self.epoch
        if self.table is not None:
            self.table.forget_pool(POOL)
        self.content = [POISON] * NUM_PAGES

    # --- transfer service ---------------------------------------------------------------------------------------

    def service_takes(self, call: tuple[str, int, int, str]) -> None:
        self.calls = tuple(c for c in self.calls if c != call)
        kind, epoch, incarnation, rid = call
        assert self.table is not None
        if epoch != self.epoch or incarnation != self.incarnation or not self.receiver_alive:
            return  # refused as STALE_EPOCH or STALE_INCARNATION
        held = self.held[rid]
        key = GrantKey(POOL, rid)
        if kind == "revoke":
            self.table.revoke(key)
            self._tell_if_drained(rid)
            return
        try:
            self.table.open_grant(GrantSpec(key, held.secret, WINDOW, held.pages))
        except ProtocolError:
            assert held.machine.ended or held.grant in ("revoking", "drained"), "a living grant was refused"
            return
        if held.grant == "asked":
            held.grant = "open"
            held.prep_answered = True

    def _tell_if_drained(self, rid: str) -> None:
        """The reply to Revoke, or the DRAINED event; they say the same."""
        assert self.table is not None
        held = self.held.get(rid)
        if held is None or held.grant != "revoking" or not self.table.is_drained(GrantKey(POOL, rid)):
            return
        if ("revoke", self.epoch, self.incarnation, rid) in self.calls:
            return
        held.grant = "drained"
        if held.quarantined:
            self._leave_quarantine(held)

    def news_arrive(self) -> None:
        """WatchGrants: the newest condition of every grant that changed."""
        assert self.table is not None
        for status in self.table.take_changes():
            rid = status.key.reservation_id
            if rid not in self.held:
                continue
            self.held[rid].machine.progress(status.committed, status.state.value == "WRITING", self.clock)
            self._tell_if_drained(rid)

    def service_dies(self) -> None:
        """kill -9: copies stop where they are; pools survive in the engine's mapping."""
        self.table = None
        for sender in self.senders.values():
            sender.writing = None
            sender.answer = sender.answer or "UNAVAILABLE"

    def service_restarts(self) -> None:
        self.table = GrantTable()
        self.epoch += 1

    # --- senders ------------------------------------------------------------------------------------------------

    def addressable(self) -> bool:
        """Whether some reservation's address is known to the router, so that senders can use it."""
        return any(held.prep_answered for held in self.held.values())

    def open_attempt(self, name: str) -> None:
        sender = self.senders[name]
        rid = next(rid for rid, held in self.held.items() if held.prep_answered)
        assert self.table is not None
        if self.held[rid].epoch != self.epoch:
            sender.answer = "STALE_EPOCH"
            return
        try:
            opened = self.table.open_attempt(
                GrantKey(POOL, rid), self.held[rid].secret, sender.range, sender.number, name
            )
        except ProtocolError as error:
            sender.answer = error.reason
            return
        if isinstance(opened, AlreadyCommitted):
            sender.answer = "COMMITTED"
        elif not isinstance(opened, Draining):
            sender.attempt = opened

    def copy_begins(self, name: str, position: int) -> None:
        sender = self.senders[name]
        assert self.table is not None
        assert sender.attempt is not None
        try:
            self.table.begin_write(sender.attempt, TokenRange(position, position + 1))
        except ProtocolError as error:
            sender.answer = error.reason
            return
        sender.writing = position
        self.content[self.page_of(sender, position)] = TORN

    def copy_ends(self, name: str) -> None:
        sender = self.senders[name]
        assert self.table is not None
        assert sender.attempt is not None
        assert sender.writing is not None
        position, sender.writing = sender.writing, None
        self.content[self.page_of(sender, position)] = f"{sender.attempt.key.reservation_id}:{position}"
        self.table.end_write(sender.attempt, 1)
        if not sender.alive:
            sender.answer = "DEAD"
            return
        try:
            committed = self.table.mark_in_place(sender.attempt, TokenRange(position, position + 1))
        except ProtocolError as error:
            sender.answer = error.reason
            return
        sender.done_positions |= {position}
        if committed:
            sender.answer = "COMMITTED"

    def sender_stops(self, name: str, how: str) -> None:
        """Cancelled, or its process died: the service ends the attempt; a copy under way runs to its end."""
        sender = self.senders[name]
        sender.alive = False
        if sender.attempt is not None:
            assert self.table is not None
            self.table.end_attempt(sender.attempt)
        if sender.writing is None:
            sender.answer = how

    def page_of(self, sender: Sender, position: int) -> int:
        assert sender.attempt is not None
        rid = sender.attempt.key.reservation_id
        pages = self.held[rid].pages
        return pages[position - WINDOW.begin]

    def tick(self) -> None:
        self.clock += 1

    # --- what must hold -----------------------------------------------------------------------------------------

    def writes(self) -> list[tuple[str, int]]:
        """(reservation, page) of every copy under way."""
        return [
            (s.attempt.key.reservation_id, self.page_of(s, s.writing))
            for s in self.senders.values()
            if s.writing is not None and s.attempt is not None
        ]

    def check(self) -> None:
        """Safety: no page in two hands, none lost, no write after free, no two writers at one page."""
        writes = self.writes()
        assert len({page for _, page in writes}) == len(writes), "two copies into one page"
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
                assert not self.ledger.is_free(page), "a page in use is free"
        assert counts.held + counts.quarantined == len(owners), "a page is lost"
        for rid, page in writes:
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
