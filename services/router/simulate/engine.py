"""A simulated engine: continuous batching under a token budget with a prefix cache, as services/engine does it.

What it is asked takes effect between two steps. A step computes a token of every sequence that decodes, then pieces of
prompts in order of age, then new ones, and takes as long as EngineHardware says. Sequences are never short of pages;
the prefix cache has so many, and gives up those that were used longest ago.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence

from services.protocol.ranges import TokenRange
from services.router.clock import now
from services.router.fleet.cached_blocks import KvEvent
from services.router.fleet.info import Load, WorkDone
from services.router.request import PolicyRequest
from services.router.simulate.hardware import EngineHardware
from services.router.simulate.work import Booking, Work
from services.router.values import Chunk, FinishReason

Plan = list[tuple[Work, int]]  # and how many tokens of it
TOKEN = 0  # what every sequence generates


class SimulatedEngine:
    """`on_load` and `on_event` get what an engine's streams tell. Belongs to one event loop."""

    def __init__(
        self,
        hardware: EngineHardware,
        bytes_per_token: int,
        on_load: Callable[[Load], object],
        on_event: Callable[[KvEvent], object],
        report_s: float,
    ) -> None:
        self.hardware = hardware
        self._bytes_per_token = bytes_per_token
        self._on_load, self._on_event, self._report_s = on_load, on_event, report_s
        self._report: asyncio.TimerHandle | None = None
        self._told = Load()
        self._work = WorkDone()
        self._inbox: list[Callable[[], None]] = []
        self._busy = False
        self._waiting: list[Work] = []
        self._running: list[Work] = []
        self._expecting: list[Work] = []  # KV from a peer
        self._cached: OrderedDict[bytes, None] = OrderedDict()  # the one used longest ago first
        self._coming: dict[bytes, Work] = {}  # blocks that are being computed
        self._event_numbers = itertools.count(1)
        on_event(KvEvent(0, snapshot=True, snapshot_complete=True))

    async def reserve(self, request: PolicyRequest, end: int) -> Booking:
        """Room for what is not cached of prompt[:end]."""
        booked: asyncio.Future[Booking] = asyncio.get_running_loop().create_future()

        def book() -> None:
            hashes = self._hashes(request)
            if not booked.done():
                booked.set_result(Booking(hashes, TokenRange(min(self._match(hashes), end), end)))

        self._post(book)
        return await booked

    def publish(self, booking: Booking) -> None:
        """What it holds is cached from now on."""
        end = booking.window.end if booking.is_filled else booking.window.begin
        self._post(lambda: self._store(booking.hashes[: end // self.hardware.page_size]))

    async def send(self, work: Work) -> None:
        """Computes what is not cached of a range and moves it; returns when it has arrived."""
        self._post(lambda: self._waiting.append(work))
        try:
            await work.arrived.wait()
        finally:
            self.remove(work)
        if work.booking is not None and work.sending is not None:
            work.booking.receive(len(work.sending))

    def generate(self, work: Work) -> None:
        """Begins a sequence, or has it wait for its KV."""
        self._post(lambda: self._begin(work))

    def remove(self, work: Work) -> None:
        """Ends it, wherever it is."""
        for works in (self._waiting, self._running, self._expecting):
            if work in works:
                works.remove(work)
        for block in [block for block, other in self._coming.items() if other is work]:
            del self._coming[block]

    def _begin(self, work: Work) -> None:
        booking = work.booking
        if booking is None:
            self._waiting.append(work)
        elif booking.is_filled:
            self._attach(work, booking)
        else:
            self._expecting.append(work)
            booking.on_filled = lambda: self._post(lambda: self._attach(work, booking))

    def _attach(self, work: Work, booking: Booking) -> None:
        if work in self._expecting:
            self._expecting.remove(work)
        if work.mailbox is not None and not work.mailbox.closed:
            work.computed, work.matched = booking.window.end, booking.window.begin
            self._publish(work)
            self._waiting.append(work)

    def _post(self, command: Callable[[], None]) -> None:
        self._inbox.append(command)
        if not self._busy:
            self._busy = True
            asyncio.get_running_loop().call_soon(self._step)

    def _step(self) -> None:
        commands, self._inbox = self._inbox, []
        for command in commands:
            command()
        begin = now()
        plan = self._plan(begin)
        self._tell_load()
        if plan:
            end = begin + self.seconds(plan)
            asyncio.get_running_loop().call_at(end, self._settle, plan, begin)
        elif self._inbox:
            asyncio.get_running_loop().call_soon(self._step)
        else:
            self._busy = False

    def seconds(self, plan: Sequence[tuple[Work, int]]) -> float:
        """How long a step takes."""
        each, total = self.hardware, self.hardware.step_s
        for work, tokens in plan:
            if tokens == 1:
                total += each.row_s + each.context_token_s * work.computed
            else:
                total += tokens * (each.prompt_token_s + each.attention_s * (work.computed + tokens / 2))
        return total

    def _plan(self, moment: float) -> Plan:
        budget = self.hardware.max_step_tokens
        plan: Plan = []
        for work in sorted(self._running, key=lambda work: work.left != 1):
            budget -= self._take(plan, work, budget)
        for work in list(self._waiting):
            if budget <= 0 or len(self._running) >= self.hardware.max_batch_size:
                break
            if self._admit(work, moment):
                budget -= self._take(plan, work, budget)
        return plan

    def _take(self, plan: Plan, work: Work, budget: int) -> int:
        """As many tokens as the budget lets it have. Pieces of a prompt end at a page's end where they can."""
        tokens, page_size = min(work.left, budget), self.hardware.page_size
        aligned = (work.computed + tokens) // page_size * page_size - work.computed
        if aligned > 0 and tokens < work.left:
            tokens = aligned
        if tokens > 0:
            plan.append((work, tokens))
        return tokens

    def _admit(self, work: Work, moment: float) -> bool:
        """Into the batch, unless another one computes the block that it lacks next."""
        page_size = self.hardware.page_size
        if not work.computed:
            limit = work.goal if work.sending else work.goal - 1
            work.matched = work.computed = min(self._match(work.hashes), limit // page_size * page_size)
            work.published = work.computed // page_size
            if work.hashes[work.published : limit // page_size][:1] and work.hashes[work.published] in self._coming:
                work.computed = work.matched = 0
                return False
        self._waiting.remove(work)
        work.scheduled_at = moment if work.scheduled_at is None else work.scheduled_at
        if work.sending and work.carry:
            ready = max(0, min(work.computed, work.sending.end) - work.sending.begin)
            work.arrives_at = work.carry(ready, moment, moment)
        if not work.left:
            self._sent(work, moment)
            return False
        self._running.append(work)
        for block in work.hashes[work.published : work.goal // page_size]:
            self._coming.setdefault(block, work)
        return True

    def _settle(self, plan: Plan, begin: float) -> None:
        moment = now()
        self._count(plan, moment - begin)
        for work, tokens in plan:
            if work not in self._running:
                continue  # cancelled meanwhile
            work.computed += tokens
            work.own += 0 if work.generated else tokens
            self._publish(work)
            if work.sending and work.carry:
                moved = min(tokens, max(0, work.computed - work.sending.begin))
                work.arrives_at = work.carry(moved, begin, moment)
            if not work.left:
                self._sent(work, moment) if work.sending else self._token(work, moment)
        self._step()

    def _count(self, plan: Plan, seconds: float) -> None:
        prompts = [(work.computed, tokens) for work, tokens in plan if tokens > 1]
        rows = [work.computed for work, tokens in plan if tokens == 1]
        before = self._work
        self._work = WorkDone(
            before.busy_s + seconds,
            before.steps + 1,
            before.prompt_tokens + sum(tokens for _, tokens in prompts),
            before.prompt_context + sum(tokens * context + tokens * (tokens - 1) // 2 for context, tokens in prompts),
            before.rows + len(rows),
            before.row_context + sum(rows),
        )

    def _sent(self, work: Work, moment: float) -> None:
        work.prefilled_at = moment
        self.remove(work)
        asyncio.get_running_loop().call_at(max(moment, work.arrives_at), work.arrived.set)

    def _token(self, work: Work, moment: float) -> None:
        assert work.mailbox is not None
        work.prefilled_at = moment if work.prefilled_at is None else work.prefilled_at
        work.generated += 1
        work.goal += 1
        if work.generated < work.max_tokens:
            work.mailbox.put(Chunk((TOKEN,)))
            return
        self.remove(work)
        work.mailbox.put(Chunk((TOKEN,), finish=FinishReason.LENGTH, timing=work.timing(moment, self._bytes_per_token)))
        work.mailbox.close()

    def _hashes(self, request: PolicyRequest) -> list[bytes]:
        return request.block_hashes(self.hardware.page_size)

    def _match(self, hashes: Sequence[bytes]) -> int:
        missing = next((index for index, block in enumerate(hashes) if block not in self._cached), len(hashes))
        self._touch(hashes[:missing])
        return missing * self.hardware.page_size

    def _touch(self, blocks: Sequence[bytes]) -> None:
        """They are used. The last ones count as used first: what follows a block goes before it."""
        for block in reversed(blocks):
            self._cached[block] = None
            self._cached.move_to_end(block)

    def _publish(self, work: Work) -> None:
        end = work.computed // self.hardware.page_size
        if end > work.published:
            self._store(work.hashes[:end])  # all of it: what comes first must not go first
            work.published = end

    def _store(self, blocks: Sequence[bytes]) -> None:
        new = tuple(block for block in blocks if block not in self._cached)
        for block in blocks:
            self._coming.pop(block, None)
        if new:
            self._touch(blocks)
            self._on_event(KvEvent(next(self._event_numbers), stored=new))
            if removed := self._evict():
                self._on_event(KvEvent(next(self._event_numbers), removed=removed))

    def _evict(self) -> tuple[bytes, ...]:
        """What the cache has no room for."""
        too_many = max(0, len(self._cached) - self.hardware.usable_pages)
        return tuple(self._cached.popitem(last=False)[0] for _ in range(too_many))

    def _tell_load(self) -> None:
        """At once if the last report is long enough ago, else when it is."""
        if self._report is None:
            self._on_load(self._load())
            self._report = asyncio.get_running_loop().call_later(self._report_s, self._tell_again)

    def _tell_again(self) -> None:
        self._report = None
        told = self._told
        if self._load() != told:
            self._tell_load()

    def _load(self) -> Load:
        works = [*self._running, *self._waiting]
        self._told = Load(
            running=sum(1 for work in self._running if work.mailbox),
            waiting=sum(1 for work in self._waiting if work.mailbox),
            waiting_for_kv=len(self._expecting),
            queued_tokens=sum(work.left for work in works if not work.generated),
            context_tokens=sum(work.computed for work in works),
            usable_pages=self.hardware.usable_pages,
            work=self._work,
        )
        return self._told
