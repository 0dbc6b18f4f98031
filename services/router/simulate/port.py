"""The router's connection to a simulated engine."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable

from services.protocol.ranges import TokenRange
from services.protocol.timing import Timing
from services.router.clock import now
from services.router.fleet.cached_blocks import KvEvent
from services.router.fleet.info import EngineInfo, Load
from services.router.fleet.mailbox import Mailbox
from services.router.fleet.port import ReservedKv
from services.router.fleet.session import Sequence
from services.router.request import ModelKey, PolicyRequest
from services.router.simulate.engine import SimulatedEngine
from services.router.simulate.hardware import EngineHardware, FleetHardware
from services.router.simulate.link import Link
from services.router.simulate.work import Booking, Work
from services.router.values import Chunk, FinishReason

MODEL = ModelKey("simulated", b"simulated", b"simulated")
_MAX_BUFFERED = 1 << 20  # tokens


class Wires:
    """What joins the simulated engines: the reservations that they may write to, and a link for each pair."""

    def __init__(self, hardware: FleetHardware) -> None:
        self.hardware = hardware
        self.bookings: dict[bytes, tuple[str, Booking]] = {}  # with the receiver's name
        self._links: dict[tuple[str, str], Link] = {}

    def carry(self, sender: str, receiver: str) -> Callable[[int, float, float], float]:
        """When so many tokens will have arrived, see Link."""
        link = self._links.setdefault((sender, receiver), Link(self.hardware.bytes_per_s))
        each = self.hardware.bytes_per_token
        return lambda tokens, ready_at, last_at: link.carry(tokens * each, ready_at, last_at)


class SimulatedPort:
    """An EnginePort. Half of a call's time goes by before the engine hears of it, half after it has answered."""

    def __init__(self, name: str, hardware: EngineHardware, wires: Wires) -> None:
        self._info = EngineInfo(
            name=name,
            incarnation=name.encode(),
            contract_version="1.0",
            model=MODEL,
            page_size=hardware.page_size,
            max_context=hardware.max_context,
            vocab_size=1 << 20,
            max_batch_size=hardware.max_batch_size,
            can_transfer=True,
        )
        self._wires = wires
        self._loads: asyncio.Queue[Load] = asyncio.Queue()
        self._events: asyncio.Queue[KvEvent] = asyncio.Queue()
        fleet = wires.hardware
        self._engine = SimulatedEngine(
            hardware, fleet.bytes_per_token, self._loads.put_nowait, self._events.put_nowait, fleet.report_s
        )
        self._numbers = itertools.count(1)
        self._half_call_s = wires.hardware.call_s / 2

    async def close(self) -> None:
        """Nothing is open."""

    async def prep_recv(self, call_id: str, request: PolicyRequest, end: int, max_wait_s: float) -> ReservedKv:
        """See EnginePort."""
        await asyncio.sleep(self._half_call_s)
        booking = await self._engine.reserve(request, end)
        name = f"{self._info.name}/{next(self._numbers)}"
        self._wires.bookings[name.encode()] = self._info.name, booking
        await asyncio.sleep(self._half_call_s)
        timing = Timing(matched_tokens=booking.window.begin)
        return ReservedKv(name, b"", name.encode(), booking.window, 0.0, timing)

    async def remote_send(
        self, call_id: str, request: PolicyRequest, tokens: TokenRange, kv: ReservedKv, attempt: int
    ) -> Timing:
        """See EnginePort."""
        await asyncio.sleep(self._half_call_s)
        receiver, booking = self._wires.bookings[kv.address]
        work = self._work(request, tokens.end)
        work.sending, work.booking = tokens, booking
        work.carry = self._wires.carry(self._info.name, receiver)
        await self._engine.send(work)
        timing = work.timing(now(), self._wires.hardware.bytes_per_token)
        await asyncio.sleep(self._half_call_s)
        return timing

    def start_generate(self, call_id: str, request: PolicyRequest, begin: int, kv: ReservedKv | None) -> Sequence:
        """See EnginePort."""
        mailbox = Mailbox(_MAX_BUFFERED)
        work = self._work(request, len(request.prompt))
        work.mailbox = mailbox
        if kv is not None:
            work.booking = self._wires.bookings.pop(kv.address)[1]
        asyncio.get_running_loop().call_later(self._half_call_s, self._engine.generate, work)

        def cancel(_: str) -> None:
            self._engine.remove(work)
            mailbox.put(Chunk(finish=FinishReason.CANCELLED))
            mailbox.close()

        return Sequence(call_id, mailbox, cancel)

    async def release(self, kv: ReservedKv, *, publish: bool, timeout_s: float) -> None:
        """See EnginePort."""
        _, booking = self._wires.bookings.pop(kv.address, (None, None))
        if publish and booking is not None:
            self._engine.publish(booking)

    async def renew(self, kv: ReservedKv, *, timeout_s: float) -> float:
        """Leases do not end."""
        return 0.0

    async def abort(self, call_id: str, *, timeout_s: float) -> None:
        """A call that is cut off leaves nothing behind."""

    async def get_info(self) -> EngineInfo:
        """See EnginePort."""
        return self._info

    async def watch_health(self) -> AsyncGenerator[bool, None]:
        """It is always well."""
        yield True
        await asyncio.Event().wait()

    async def watch_load(self) -> AsyncGenerator[Load, None]:
        """See EnginePort."""
        while True:
            yield await self._loads.get()

    async def watch_kv_events(self) -> AsyncGenerator[KvEvent, None]:
        """See EnginePort."""
        while True:
            yield await self._events.get()

    async def download_tokenizer(self) -> AsyncGenerator[tuple[str, bytes], None]:
        """See EnginePort."""
        yield "tokenizer.json", b"{}"

    def _work(self, request: PolicyRequest, goal: int) -> Work:
        return Work(request, request.block_hashes(self._info.page_size), goal, now())
