"""What the transfer service and the sending engines do."""

from __future__ import annotations

from services.protocol.errors import ProtocolError
from services.protocol.grants import AlreadyCommitted, Draining, GrantKey, GrantSpec, GrantTable, PoolPages
from services.protocol.ranges import TokenRange
from tests.protocol.receiver import ReceiverSide
from tests.protocol.state import POOL, SECOND_POOL, TORN, WHOLE, WINDOW, Copy, Sender


class TransferSide(ReceiverSide):
    """Grants, copies in two steps (torn in between), commits, and the ends of senders and service."""

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
        second = (PoolPages(SECOND_POOL, held.pages),)
        try:
            self.table.open_grant(GrantSpec(key, held.secret, WINDOW, held.pages, second, WHOLE))
        except ProtocolError:
            assert held.machine.ended or held.grant in ("revoking", "drained"), "a living grant was refused"
            return
        if held.grant == "asked":
            held.grant = "open"
            held.prep_answered = True

    def _tell_if_drained(self, rid: str) -> None:
        """The reply to Revoke, with all that was committed."""
        assert self.table is not None
        held = self.held.get(rid)
        if held is None or held.grant != "revoking" or not self.table.is_drained(GrantKey(POOL, rid)):
            return
        if ("revoke", self.epoch, self.incarnation, rid) in self.calls:
            return
        held.grant = "drained"
        if held.releasing:
            self.fence_answers(rid)
        elif held.quarantined:
            self._leave_quarantine(held)

    def news_arrive(self) -> None:
        """WatchGrants: the newest condition of every grant that changed."""
        assert self.table is not None
        for status in self.table.take_changes():
            rid = status.key.reservation_id
            if rid not in self.held:
                continue
            self.held[rid].machine.progress(status.committed, status.state.value == "WRITING", self.clock)
            self.publish_if_filled(rid)
            self._tell_if_drained(rid)

    def service_dies(self) -> None:
        """kill -9: copies stop where they are; pools survive in the engine's mapping."""
        self.table = None
        for sender in self.senders.values():
            sender.writing = ()
            sender.answer = sender.answer or "UNAVAILABLE"

    def service_restarts(self) -> None:
        self.table = GrantTable()
        self.epoch += 1

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

    def copy_begins(self, name: str, copy: Copy) -> None:
        sender, (position, _) = self.senders[name], copy
        assert self.table is not None
        assert sender.attempt is not None
        try:
            self.table.begin_write(sender.attempt, TokenRange(position, position + 1))
        except ProtocolError as error:
            sender.answer = error.reason
            return
        sender.writing = (*sender.writing, copy)
        self._write(sender, copy, TORN)

    def copy_ends(self, name: str, copy: Copy) -> None:
        sender, (position, extent) = self.senders[name], copy
        assert self.table is not None
        assert sender.attempt is not None
        sender.writing = tuple(other for other in sender.writing if other != copy)
        self._write(sender, copy, f"{sender.attempt.key.reservation_id}:{position}")
        self.table.end_write(sender.attempt, 1)
        if not sender.alive:
            sender.answer = "DEAD"
            return
        try:
            committed = self.table.mark_in_place(sender.attempt, TokenRange(position, position + 1), extent)
        except ProtocolError as error:
            sender.answer = error.reason
            return
        sender.done |= {copy}
        if committed:
            sender.answer = "COMMITTED"

    def _write(self, sender: Sender, copy: Copy, content: str) -> None:
        position, extent = copy
        for head in range(*extent.kv_heads):
            self.content[self.page_of(sender, position)][head] = content

    def sender_stops(self, name: str, how: str) -> None:
        """Cancelled, or its process died: the service ends the attempt; a copy under way runs to its end."""
        sender = self.senders[name]
        sender.alive = False
        if sender.attempt is not None:
            assert self.table is not None
            self.table.end_attempt(sender.attempt)
        if not sender.writing:
            sender.answer = how
