"""What the receiver's engine does: the rules of docs/design.md as thin calls into the state machines."""

from __future__ import annotations

import pickle

from services.protocol.errors import ReservationGone
from services.protocol.grants import GrantKey
from services.protocol.pages import OutOfPages, PageLedger
from services.protocol.ranges import RangeSet
from services.protocol.reservation import UNATTACHED, Reservation, ReservationState
from tests.protocol.state import LEASE, NUM_PAGES, POOL, SECOND_POOL, WHOLE, WINDOW, Held, WorldState, poisoned


class ReceiverSide(WorldState):
    """PrepRecv, leases, StartGenerate, Release, and the death of either process."""

    def prep(self, rid: str) -> None:
        """PrepRecv: pages, then a grant. Refused at once if pages are short or the service is known gone.

        Cached pages make room: they are in nobody's use, and whoever gets them next may write them.
        """
        if not self.connected:
            return
        for page in range(NUM_PAGES):
            if self.ledger.is_published(page) and not self.ledger.users(page):
                self.ledger.evict(page)
        try:
            pages = self.ledger.allocate(len(WINDOW))
        except OutOfPages:
            return
        for page, content in zip(pages, poisoned(len(pages)), strict=True):
            self.content[page] = content
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
        else:
            machine.release(self.clock)
        self._give_up_pages(rid)

    def release_published(self, rid: str) -> None:
        """Release with publish: of what is not filled the fence brings the last word."""
        held = self.held[rid]
        if held.grant != "open" or held.machine.state is ReservationState.FILLED or held.machine.expired(self.clock):
            self.end(rid, "release")
            return
        held.starting = False
        held.releasing = True
        held.promised = self.reachable() and self.committed(rid).covers(WINDOW)
        self._revoke(rid)

    def fence_answers(self, rid: str) -> None:
        """What is committed is known for good: whole it is published, and the Release answered."""
        held = self.held[rid]
        held.machine.progress(self.committed(rid), False, self.clock)
        self.publish_if_filled(rid)
        if held.releasing:
            self._release_waiting(rid)

    def committed(self, rid: str) -> RangeSet:
        """What the service knows to be committed."""
        assert self.table is not None
        key = GrantKey(POOL, rid)
        status = next((status for status in self.table.statuses(POOL) if status.key == key), None)
        return self.table.last_committed(key) if status is None else status.committed

    def _release_waiting(self, rid: str) -> None:
        held = self.held[rid]
        is_late = held.machine.expired(self.clock)
        self.end(rid, "release")
        is_published = held.machine.state is ReservationState.RELEASED
        assert is_published or is_late or not held.promised, "what was committed is not published"

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
            wanted = [f"{rid}:{position}"] * WHOLE.kv_head_count
            assert self.content[page] == wanted, f"read {self.content[page]} before commit"

    def publish_if_filled(self, rid: str) -> None:
        """Others may read the pages from the moment they are filled; nobody waits for a release."""
        held = self.held[rid]
        if held.machine.state is not ReservationState.FILLED or self.ledger.is_published(held.pages[0]):
            return
        self._read(rid)
        for page in held.pages:
            self.ledger.publish(page)
        if held.releasing:
            self._release_waiting(rid)

    def _give_up_pages(self, rid: str) -> None:
        held = self.held[rid]
        held.starting = held.releasing = False
        if self.ledger.is_published(held.pages[0]):
            # Whole and committed: no copy into them can begin any more, so no fence has to be waited for.
            self.ledger.release(held.pages)
            self._revoke(rid)
            return
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
        if held.grant in ("revoking", "drained"):
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
            for key in self.table.keys(SECOND_POOL):  # the loss of either rank is that of the receiver
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
            self.table.forget_pool(SECOND_POOL)
        self.content = poisoned(NUM_PAGES)
