"""A KV transfer service in this process: real grants, real copies, and every delay in the test's hand."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.engine.core import api, ports
from services.engine.errors import RequestCancelled
from services.protocol.address import KvAddress
from services.protocol.errors import ProtocolError, ServiceError, StaleEpoch
from services.protocol.grants import Attempt, Draining, GrantKey, GrantSpec, GrantState, GrantTable
from services.protocol.ranges import TokenRange

READY_SLOTS = 2


@dataclass(eq=False)
class _Push:
    spec: ports.PushSpec
    num_layers: int = 0  # in place
    num_bytes: int = 0
    attempt: Attempt | None = None


class FakeService:
    """One engine's service: owns grants into its memory (layers, pages, page_size). Requests wait until pump()."""

    def __init__(self, network: Network, endpoint: str, memory: NDArray[np.int64]) -> None:
        self.network = network
        self.endpoint = endpoint
        self.memory = memory
        self.page_size = memory.shape[2]
        self.submit: Callable[[api.Command], None] = lambda command: None
        self.requests: deque[Callable[[], None]] = deque()
        self.pushes: dict[int, _Push] = {}
        self.ready = [0] * READY_SLOTS
        self.moved_bytes = 0
        self.max_layers: int | None = None  # moves no further than this many layers, to look at what is there then
        self.incarnation = 0
        self.num_losses_untold = 0
        self.start()

    def start(self) -> None:
        """A new incarnation over the same memory."""
        self.incarnation += 1
        self.epoch = f"{self.endpoint} {self.incarnation}".encode().ljust(16)[:16]
        self.pool_id = f"pool of {self.endpoint} {self.incarnation}"
        self.table = GrantTable()

    def announce(self) -> None:
        self.submit(api.TransferServiceReady(self.endpoint, self.pool_id, self.epoch, READY_SLOTS))

    def crash(self) -> None:
        """Everything under way is gone; the engine is told."""
        self.requests.clear()
        self.pushes.clear()
        for other in self.network.services.values():
            for push in [p for p in other.pushes.values() if p.spec.target.endpoint == self.endpoint]:
                other.end_push(push, error=StaleEpoch("the receiver's service has gone"))
        self.submit(api.TransferServiceLost())
        # What the loop thread asks before it hears of the loss must not reach the next incarnation.
        self.num_losses_untold += 1
        self.submit(api.ListReservations("nobody", lambda _: self.hear()))
        self.start()

    def hear(self) -> None:
        self.num_losses_untold -= 1

    @property
    def is_deaf(self) -> bool:
        return self.num_losses_untold > 0

    # --- KvPort -----------------------------------------------------------------------------------------------

    def grant(self, spec: ports.GrantSpec) -> None:
        if not self.is_deaf:
            self.requests.append(lambda: self._grant(spec))

    def revoke(self, reservation_id: str) -> None:
        if not self.is_deaf:
            self.requests.append(lambda: self._revoke(reservation_id))

    def push(self, spec: ports.PushSpec) -> None:
        if self.is_deaf:
            return
        if spec.ready_slot is not None:
            assert self.ready[spec.ready_slot] == 0
            assert spec.ready_slot not in [p.spec.ready_slot for p in self.pushes.values()]
        push = self.pushes[spec.push_id] = _Push(spec)
        if spec.ready_slot is None and self.network.moves_at_once:
            self.advance(push)

    def cancel_push(self, push_id: int) -> None:
        if not self.is_deaf:
            self.requests.append(lambda: self._cancel_push(push_id))

    def end_attempt(self, target: KvAddress, attempt: int, attempt_range: TokenRange, writer_id: str) -> None:
        if not self.is_deaf:
            self.requests.append(lambda: self._end_attempt(target, attempt, attempt_range, writer_id))

    def raise_ready(self, slot: int, layers: int) -> None:
        self.ready[slot] = layers
        if layers and self.network.moves_at_once:
            for push in list(self.pushes.values()):
                if push.spec.ready_slot == slot:
                    self.advance(push)

    # --- what the test lets happen ----------------------------------------------------------------------------

    def pump(self) -> bool:
        """Serves the oldest request. Returns whether there was one."""
        if not self.requests:
            return False
        self.requests.popleft()()
        return True

    def advance(self, push: _Push) -> bool:
        """Moves what is ready of a push, and ends it when all is. Returns whether anything happened."""
        layers = len(self.memory)
        ready = layers if push.spec.ready_slot is None else self.ready[push.spec.ready_slot]
        if self.max_layers is not None:
            ready = min(ready, self.max_layers)
        before = push.num_layers
        target = self.network.services[push.spec.target.endpoint]
        try:
            while push.num_layers < ready:
                if not target.write(push, push.num_layers, self):
                    return push.num_layers > before
                push.num_layers += 1
            if push.num_layers < layers:
                return push.num_layers > before
            is_committed = push.attempt is None or target.table.mark_in_place(push.attempt, push.spec.range)
        except ServiceError as error:
            self.end_push(push, error=error)
        else:
            target.tell()
            self.end_push(push, committed=is_committed)
        return True

    def write(self, push: _Push, layer: int, source: FakeService) -> bool:
        """Takes one layer of a push in, if the grant allows. False while an earlier attempt drains."""
        spec = push.spec
        if spec.target.epoch != self.epoch:
            raise StaleEpoch("an earlier incarnation is meant")
        key = GrantKey(self.pool_id, spec.target.reservation_id)
        if push.attempt is None:
            opened = self.table.open_attempt(key, spec.target.secret, spec.attempt_range, spec.attempt, spec.writer_id)
            if isinstance(opened, Draining):
                return False
            if not isinstance(opened, Attempt):
                push.num_layers = len(self.memory) - 1  # committed already: nothing to write
                return True
            push.attempt = opened
        self.table.begin_write(push.attempt, spec.range)
        window = spec.target.window
        pages = spec.target.shards[0].page_ids
        first_target, first_source = window.begin // self.page_size, spec.range.begin // self.page_size
        for position in range(spec.range.begin, spec.range.end):
            index, offset = divmod(position, self.page_size)
            value = source.memory[layer, spec.page_ids[index - first_source], offset]
            self.memory[layer, pages[index - first_target], offset] = value
        num_bytes = 8 * len(spec.range)
        self.table.end_write(push.attempt, num_bytes)
        push.num_bytes += num_bytes
        self.moved_bytes += num_bytes
        self.tell()
        status = next(status for status in self.table.statuses(self.pool_id) if status.key == key)
        self.submit(api.GrantProgress(spec.target.reservation_id, status.committed, True, status.bytes))
        return True

    def end_push(self, push: _Push, *, committed: bool = False, error: ServiceError | None = None) -> None:
        if self.pushes.pop(push.spec.push_id, None) is not None:
            self.submit(api.PushEnded(push.spec.push_id, push.num_bytes, committed, 0.0, error))

    def tell(self) -> None:
        """Passes on what changed about grants."""
        for status in self.table.take_changes():
            name = status.key.reservation_id
            if status.state is GrantState.DRAINED:
                self.submit(api.GrantDrained(name, status.committed))
            else:
                is_writing = status.state is GrantState.WRITING
                self.submit(api.GrantProgress(name, status.committed, is_writing, status.bytes))

    def _grant(self, spec: ports.GrantSpec) -> None:
        key = GrantKey(self.pool_id, spec.reservation_id)
        try:
            self.table.open_grant(GrantSpec(key, spec.secret, spec.window, spec.page_ids))
        except ServiceError as error:
            self.submit(api.GrantFailed(spec.reservation_id, error))
        else:
            self.submit(api.GrantOpened(spec.reservation_id))
            self.tell()

    def _revoke(self, reservation_id: str) -> None:
        key = GrantKey(self.pool_id, reservation_id)
        was_known = not self.table.is_drained(key)
        self.table.revoke(key)
        self.tell()
        if not was_known:
            self.submit(api.GrantDrained(reservation_id, self.table.last_committed(key)))

    def _cancel_push(self, push_id: int) -> None:
        push = self.pushes.get(push_id)
        if push is not None:
            self.end_push(push, error=RequestCancelled("the push was cancelled"))

    def _end_attempt(self, target: KvAddress, attempt: int, attempt_range: TokenRange, writer_id: str) -> None:
        service = self.network.services[target.endpoint]
        if target.epoch != service.epoch:
            return
        key = GrantKey(target.shards[0].pool_id, target.reservation_id)
        with contextlib.suppress(ProtocolError):
            opened = service.table.open_attempt(key, target.secret, attempt_range, attempt, writer_id)
            if isinstance(opened, Attempt):
                service.table.end_attempt(opened)
        service.tell()


class Network:
    """All services, by endpoint."""

    def __init__(self) -> None:
        self.services: dict[str, FakeService] = {}
        self.moves_at_once = True  # what is ready moves as soon as it is announced, during the step

    def pump(self) -> bool:
        """Lets everything happen that can. Returns whether anything did."""
        is_busy = False
        for service in self.services.values():
            while service.pump():
                is_busy = True
            for push in list(service.pushes.values()):
                is_busy |= service.advance(push)
        return is_busy
