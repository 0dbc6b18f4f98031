"""PrepRecv: calls that ask for a reservation, and those of them that wait: for a prefix in flight, or for room."""

from __future__ import annotations

from collections import deque

from services.engine.core.account import Account
from services.engine.core.admission import check_prep_recv
from services.engine.core.api import PrepRecv, Reserved
from services.engine.core.blocks import BlockChain
from services.engine.core.booking import Booking, Grant
from services.engine.core.context import Context
from services.engine.core.fingerprints import fingerprint
from services.engine.core.prefix_waits import PrefixWait
from services.engine.core.reservations import Reservations
from services.engine.core.timers import Timer
from services.engine.errors import NoPages, QueueFull, RequestCancelled, TransferServiceGone
from services.protocol.address import KvAddress, KvShard
from services.protocol.errors import ReservationGone, ServiceError
from services.protocol.hashes import prompt_digest


class PrepRecvCall:
    """A call and its retries, until its reservation is over or a sequence has it."""

    def __init__(self, desk: PrepRecvs, command: PrepRecv, chain: BlockChain, account: Account) -> None:
        self._desk = desk
        self.command = command
        self.chain = chain  # the tokens of prompt[:end]
        self.account = account
        self.num_callers = 1
        self.replies = [command.reply]  # not answered yet
        self.was_answered = False  # somebody has the address
        self.wait = PrefixWait(in_line=False)
        self.booking: Booking | None = None  # None while it waits
        self.timer: Timer | None = None  # end of the wait for room

    def cancel(self) -> None:
        """One of the callers is gone; when all are, nobody has the address."""
        self.num_callers -= 1
        if self.num_callers <= 0:
            self.was_answered = False
            self._desk.abort(self)

    def abort(self) -> None:
        """Its owner ends the reservation."""
        self._desk.abort(self)

    def opened(self) -> None:
        """See Holder."""
        self._desk.answer(self)

    def ended(self, error: ServiceError) -> None:
        """See Holder."""
        self._desk.end(self, error)


class PrepRecvs:
    """Owns the calls. Those that wait hold no page; those that wait for room are served in order."""

    def __init__(self, context: Context, reservations: Reservations) -> None:
        self._context = context
        self._reservations = reservations
        self._queue: deque[PrepRecvCall] = deque()  # for room
        self._early: list[PrepRecvCall] = []  # more of their prefix will be here soon
        self._unanswered: dict[int, PrepRecvCall] = {}  # by identity, for the day that the engine stops

    def prep_recv(self, command: PrepRecv) -> None:
        """Takes a call; it is answered at once if nothing has to be waited for. A retry shares the reservation."""
        context = self._context
        context.link.service()
        check_prep_recv(command, context.config)
        mark = fingerprint(command)
        known = context.calls.find(command.key, mark)
        if known is not None and isinstance(known.call, PrepRecvCall):
            self._join(known.call, command)
            return
        if known is not None and isinstance(known.result, ServiceError):
            raise known.result
        context.check_not_draining()
        self._check_room()
        chain = context.chain(command.prompt[: command.end], command.cache_salt)
        call = PrepRecvCall(self, command, chain, Account(context.clock()))
        context.calls.begin(command.key, mark, call)
        self._unanswered[id(call)] = call
        if self._is_early(call):
            self._early.append(call)
        else:
            self._enter(call)

    @property
    def num_waiting(self) -> int:
        """Calls that wait for room or for a prefix."""
        return len(self._early) + len(self._queue)

    def step(self) -> None:
        """Looks whether those that wait have what they wait for."""
        for call in [call for call in self._early if not self._is_early(call)]:
            self._early.remove(call)
            self._enter(call)
        while self._queue and self._reserve(self._queue[0]):
            call = self._queue.popleft()
            if call.timer is not None:
                call.timer.cancel()
            self._open(call)

    def service_lost(self) -> None:
        """Those that wait wait in vain."""
        waiting = [*self._early, *self._queue]
        self._early.clear()
        self._queue.clear()
        for call in waiting:
            self.end(call, TransferServiceGone("The KV transfer service went away."))

    def fail_all(self, error: ServiceError) -> None:
        """The engine stops: tells everybody, and leaves its own books as they are."""
        for call in list(self._unanswered.values()):
            self._reply(call, error)

    def abort(self, call: PrepRecvCall) -> None:
        """Ends a call's wait or reservation, unless a sequence has that."""
        if call.booking is not None:
            self._reservations.abort(call.booking)
        elif call in self._early or call in self._queue:
            (self._early if call in self._early else self._queue).remove(call)
            self.end(call, RequestCancelled("The request was cancelled."))

    def answer(self, call: PrepRecvCall) -> None:
        """Gives the address out."""
        assert call.booking is not None
        self._context.faults.reach("prep_recv.end")
        call.was_answered = True
        lease_s = max(0.0, call.booking.rules.expires_at - self._context.clock())
        timing = call.account.timing(self._context.clock())
        self._reply(call, Reserved(self._address(call, call.booking), call.booking.num_matched, lease_s, timing))

    def end(self, call: PrepRecvCall, error: ServiceError) -> None:
        """The call's reservation is over or was never made.

        Only if somebody had the address does a retry hear of that; otherwise it may try again.
        """
        if call.timer is not None:
            call.timer.cancel()
        gone = ReservationGone("The reservation that this request made has ended.")
        self._context.calls.finish(call.command.key, gone if call.was_answered else None)
        self._reply(call, error)

    def _join(self, call: PrepRecvCall, command: PrepRecv) -> None:
        call.num_callers += 1
        call.replies.append(command.reply)
        if call.booking is not None and call.booking.grant is not Grant.OPENING:
            self.answer(call)

    def _check_room(self) -> None:
        config = self._context.config
        if self._reservations.num_live + self.num_waiting >= config.max_reservations:
            message = f"There are {config.max_reservations} reservations already."
            raise QueueFull(message, retry_delay_s=self._context.retry_delay_s())

    def _is_early(self, call: PrepRecvCall) -> bool:
        """Whether it should wait for KV that is on its way here for another request."""
        return self._context.waits.find(call.chain, len(call.chain.tokens), call.wait, self._context.clock()) is None

    def _enter(self, call: PrepRecvCall) -> None:
        """Reserves at once, or puts the call into the queue if its caller waits, or refuses it."""
        wait_s = min(call.command.max_wait_s or 0.0, self._context.config.max_wait_s)
        if not self._queue and self._reserve(call):
            self._open(call)
        elif wait_s:
            call.timer = self._context.timers.at(call.account.arrived_at + wait_s, lambda: self._waited(call))
            self._queue.append(call)
        else:
            self.end(call, self._no_pages())

    def _reserve(self, call: PrepRecvCall) -> bool:
        """Sets pages aside if there is room."""
        command, now = call.command, self._context.clock()
        call.booking = self._reservations.reserve(command.key, call.chain, command.lease_s, call)
        if call.booking is None:
            return False
        call.account.scheduled(now)
        call.account.prefilled(now)
        call.account.matched_tokens = call.booking.num_matched
        return True

    def _open(self, call: PrepRecvCall) -> None:
        assert call.booking is not None
        self._reservations.open(call.booking)

    def _waited(self, call: PrepRecvCall) -> None:
        self._queue.remove(call)
        self.end(call, self._no_pages())

    def _no_pages(self) -> NoPages:
        return NoPages("Too few pages for the reservation.", retry_delay_s=self._context.retry_delay_s())

    def _address(self, call: PrepRecvCall, booking: Booking) -> KvAddress:
        service, config = self._context.link.service(), self._context.config
        layers, kv_heads = (0, config.layout.layer_count), (0, config.layout.kv_head_count)
        return KvAddress(
            reservation_id=booking.reservation_id,
            endpoint=service.endpoint,
            epoch=service.epoch,
            secret=booking.secret,
            window=booking.rules.window,
            shards=(KvShard(service.pool_id, layers, kv_heads, booking.page_ids),),
            layout=config.layout,
            model_digest=config.model_digest,
            prompt_digest=prompt_digest(call.chain.tokens, call.command.cache_salt),
        )

    def _reply(self, call: PrepRecvCall, answer: Reserved | ServiceError) -> None:
        self._unanswered.pop(id(call), None)
        replies, call.replies = call.replies, []
        for reply in replies:
            reply(answer)
